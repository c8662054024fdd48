"""The driver of `raycontrolnet condition`: conditioning images for a folder of pictures, and the metadata of both.

Finds the pictures and their captions, makes on Ray what is missing, and writes the metadata file that makes it a data
set to train on.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TextIO

from raycontrolnet.cluster.logs import logging_to, shown_on
from raycontrolnet.cluster.session import ray_session
from raycontrolnet.conditions.folder import CONDITIONING, ConditionFolder, Made, png_name
from raycontrolnet.conditions.make import MakeJob, Outcome, ToMake, make_on_ray
from raycontrolnet.conditions.pictures import PictureRow, find_rows
from raycontrolnet.conditions.recipes import Recipe
from raycontrolnet.config.checks import unwritable
from raycontrolnet.config.condition_config import ConditionConfig
from raycontrolnet.errors import ConfigError, DataError, Interrupted, RunError, UserError, explained
from raycontrolnet.text import Counter, duration, shorten
from raycontrolnet.version import __version__

LOG = "condition.log"
BAD_PICTURES_FILE = "condition.bad_pictures.txt"


@dataclass(frozen=True)
class BadPicture:
    """A picture that cannot be used."""

    path: str
    reason: str
    """With the path."""


@dataclass(frozen=True)
class ConditionResult:
    """What `condition` left."""

    folder: Path
    """A data set: `TrainConfig(train_data_dir=...)`."""
    num_rows: int
    """In its metadata.jsonl."""
    num_made: int
    """Conditioning images that were made now; the others were there."""
    bad_pictures: tuple[BadPicture, ...]
    """Those that were skipped."""
    seconds: float


@dataclass(frozen=True)
class _Task:
    """What there is to do, the input checked."""

    config: ConditionConfig
    recipe: Recipe
    rows: Sequence[PictureRow]
    out: ConditionFolder

    @cached_property
    def names(self) -> Mapping[str, str]:
        """Picture -> name of its conditioning image."""
        return {row.path: png_name(row.path, self.config.folder) for row in self.rows}

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """Name -> key of the conditioning image that is wanted."""
        return {name: _key(self.recipe, path) for path, name in self.names.items()}

    @cached_property
    def missing(self) -> Sequence[ToMake]:
        items = (ToMake(path, name) for path, name in self.names.items())
        return [item for item in items if not self.out.is_there(item.name, self.keys[item.name])]


def condition(config: ConditionConfig, *, stream: TextIO | None = None) -> ConditionResult:
    """Make the conditioning images of a folder of pictures, or those that are missing or of pictures that changed.

    Uses Ray as `fit` does. Killed at any moment, it goes on where it stopped when it is run again.

    Args:
        config: which conditioning images, of which pictures.
        stream: where progress is shown; standard error by default.

    Returns:
        What there is now; its `folder` is a data set to train on.

    Raises:
        UserError: bad settings, pictures or captions (exit code 2 on the command line).
        RunError: it failed, as on a full disk; what was made stands (exit code 1).
        Interrupted: Ctrl-C; what was made stands (exit code 130).
    """
    with shown_on(stream) as shown:
        try:
            return _condition(config, shown)
        except KeyboardInterrupt:
            raise Interrupted("Interrupted. What is made stands; the same command goes on from there.") from None


def _condition(config: ConditionConfig, stream: TextIO) -> ConditionResult:
    started = time.monotonic()
    task = _check(config)
    _announce(task, stream)
    problems: dict[str, str] = {}
    if task.missing:
        with (
            logging_to(task.out.path / LOG),
            explained("Making conditioning images", partial(_what_stands, task), task.out.path / LOG),
        ):
            problems = _make(task, stream)
    bad = _allowed(task, [BadPicture(path, problems[name]) for path, name in task.names.items() if name in problems])
    left_out = {picture.path for picture in bad}
    kept = [row for row in task.rows if row.path not in left_out]
    with _disk_explained(task.out.path):
        task.out.write_metadata(_metadata_row(task, row) for row in kept)
    result = ConditionResult(
        task.out.path, len(kept), len(task.missing) - len(problems), bad, time.monotonic() - started
    )
    _report(task, result, stream)
    return result


def _check(config: ConditionConfig) -> _Task:
    """Everything that can be checked before pictures are opened.

    Raises:
        ConfigError: with the problems of the pictures' folder and of that for the results.
    """
    if problem := _own_folder_problem(config):
        raise ConfigError([problem])
    rows = find_rows(
        config.folder,
        image_column=config.image_column,
        caption_column=config.caption_column,
        caption=config.caption,
        out=config.out_folder,
    )
    recipe = Recipe(config.condition, config.resolution, config.options)
    task = _Task(config, recipe, rows, ConditionFolder(config.out_folder))
    if lost := shorten([f"{path} is there" for path in task.out.foreign_files(task.keys)], "files are there"):
        lost.append(
            f"--out={task.out.path}: what is there was not written by `raycontrolnet condition`, or was changed since, "
            "and would be overwritten; name another folder"
        )
        raise ConfigError(lost)
    if problem := unwritable(task.out.path, "out"):
        raise ConfigError([problem])
    return task


def _own_folder_problem(config: ConditionConfig) -> str | None:
    """Pictures may lie beside the conditioning images, but not among them."""
    out = config.out_folder / CONDITIONING
    if out == config.folder or out in config.folder.parents:
        return f"--out={config.out_folder}: its folder {CONDITIONING} holds the pictures; name another folder"
    return None


def _make(task: _Task, stream: TextIO) -> dict[str, str]:
    """Make what is missing. Returns, by the conditioning image's name, why a picture cannot be used."""
    task.out.remove_leftovers()
    with _disk_explained(task.out.path):
        task.out.begin(item.name for item in task.missing)
        if any((task.out.conditioning / item.name).exists() for item in task.missing):
            task.out.metadata.unlink(missing_ok=True)  # which tells of those that are replaced; comes back at the end
    problems: dict[str, str] = {}
    job = MakeJob(task.recipe, str(task.out.conditioning), task.missing)
    with ray_session(task.config.address):
        counter = Counter(task.config.condition, "images", len(task.names), len(task.names) - len(task.missing), stream)
        try:
            for outcomes in make_on_ray(job):
                problems |= {done.name: done.problem for done in outcomes if done.problem is not None}
                _put_down(task, [done for done in outcomes if done.problem is None])
                counter.advance(len(outcomes))
        finally:
            counter.close()
    return problems


def _put_down(task: _Task, outcomes: Sequence[Outcome]) -> None:
    made = {done.name: Made(task.keys[done.name], done.num_bytes) for done in outcomes}
    absent = [name for name, done in made.items() if not task.out.holds(name, done)]
    if absent:
        raise UserError(
            f"--out={task.out.path}: {task.out.conditioning / absent[0]} was written and is not there: other machines "
            "see another folder of that name. Name one on storage that all share"
        )
    with _disk_explained(task.out.path):
        task.out.add(made)


def _allowed(task: _Task, bad: Sequence[BadPicture]) -> tuple[BadPicture, ...]:
    """`bad`, if the settings allow so many.

    Raises:
        DataError: with the list of them, if not.
    """
    config, total = task.config, len(task.names)
    allowed = int(config.max_bad_fraction * total) if config.on_bad_sample == "skip" else 0
    file = task.out.path / BAD_PICTURES_FILE
    with _disk_explained(task.out.path):
        file.unlink(missing_ok=True)
        if bad:
            text = "".join(f"{picture.reason}\n" for picture in bad)
            file.write_text(text, encoding="utf-8", errors="backslashreplace")
    if len(bad) <= allowed and len(bad) < total:
        return tuple(bad)
    limit = (
        f"more than --max_bad_fraction={config.max_bad_fraction:g} allows; mend or remove them"
        if config.on_bad_sample == "skip"
        else "mend or remove them, or leave them out with --on_bad_sample skip"
    )
    lines = shorten([picture.reason for picture in bad], f"bad pictures (the whole list: {file})")
    lines.append(
        f"{len(bad):,} of {total:,} pictures cannot be used: {limit}. The others' conditioning images are made"
    )
    raise DataError("\n".join(lines))


def _metadata_row(task: _Task, row: PictureRow) -> dict[str, object]:
    return {
        "image": Path(os.path.relpath(row.path, task.out.path)).as_posix(),
        "conditioning_image": f"{CONDITIONING}/{task.names[row.path]}",
        "text": row.text,
    }


def _key(recipe: Recipe, path: str) -> str:
    """Changes when the recipe, or the picture's size or time do; what cannot be seen has none that fits."""
    try:
        state = os.stat(path)  # noqa: PTH116 (of every picture, each time)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return "unseen"
    identity = repr((recipe, state.st_size, state.st_mtime_ns))
    return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()


def _announce(task: _Task, stream: TextIO) -> None:
    config, total = task.config, len(task.names)
    settings = "".join(f", {name.replace('_', ' ')} {value:g}" for name, value in config.options)
    there = total - len(task.missing)
    what = (
        f"{config.condition} of {total:,} pictures in {config.folder}, short side {config.resolution} px{settings}; "
        f"{there:,} are there"
    )
    stream.write(f"raycontrolnet {__version__}: {what}\n")


def _report(task: _Task, result: ConditionResult, stream: TextIO) -> None:
    skipped = f", {len(result.bad_pictures):,} bad ones skipped ({BAD_PICTURES_FILE})" if result.bad_pictures else ""
    data = f"--train_data_dir {shlex.quote(str(task.out.path))} --resolution {task.config.resolution}"
    stream.write(
        f"done in {duration(result.seconds)}: {result.num_rows:,} rows in {task.out.metadata}, "
        f"{result.num_made:,} conditioning images made now{skipped}\n"
        f"train on them: raycontrolnet train {data} ...\n"
    )


def _what_stands(task: _Task) -> str:
    there = sum(task.out.made.get(name, Made("", 0)).key == key for name, key in task.keys.items())
    return (
        f"{there:,} of {len(task.names):,} conditioning images are made and stand in {task.out.conditioning}; "
        "the same command goes on from there."
    )


@contextmanager
def _disk_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{folder} cannot be written to: {error.strerror or error}") from error
