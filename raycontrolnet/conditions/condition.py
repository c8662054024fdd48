"""The driver of `raycontrolnet condition`: conditioning images for a folder of pictures, and the metadata of both.

It finds the pictures and their captions, makes the missing conditioning images on Ray, and writes the metadata file
that makes the folder a data set to train on.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TextIO

from raycontrolnet.cluster.logs import logging_to, shown_on
from raycontrolnet.cluster.session import ray_session
from raycontrolnet.cluster.shared_files import SharedFiles
from raycontrolnet.conditions.folder import BAD_PICTURES_FILE, CONDITIONING, ConditionFolder, Made, png_name
from raycontrolnet.conditions.make import Outcome, ToMake, make_on_ray
from raycontrolnet.conditions.pictures import PictureRow, find_rows
from raycontrolnet.conditions.recipes import Recipe
from raycontrolnet.config.checks import unwritable
from raycontrolnet.config.condition_config import ConditionConfig
from raycontrolnet.errors import ConfigError, DataError, Interrupted, UserError, end_told, explained
from raycontrolnet.text import Counter, duration, shorten
from raycontrolnet.version import __version__

LOG = "condition.log"
LOOKED_AT_PICTURES = 32
"""Pictures, about, that are looked for on the nodes of a cluster."""


@dataclass(frozen=True)
class BadPicture:
    """A picture that cannot be used."""

    path: str
    reason: str
    """With the path."""


@dataclass(frozen=True)
class ConditionResult:
    """Result of `condition`."""

    folder: Path
    """A data set: `TrainConfig(train_data_dir=...)`."""
    num_rows: int
    """Rows in its metadata.jsonl."""
    num_made: int
    """Conditioning images that were made now; the others existed."""
    bad_pictures: tuple[BadPicture, ...]
    """Pictures that were skipped."""
    seconds: float


STANDS = "Finished images stay; the same command continues from there."


@dataclass(frozen=True)
class _Task:
    """Checked input: the pictures, and where their conditioning images go."""

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
        return {name: self.recipe.key(path) for path, name in self.names.items()}

    @cached_property
    def missing(self) -> Sequence[ToMake]:
        items = (ToMake(path, name) for path, name in self.names.items())
        return [item for item in items if not self.out.is_there(item.name, self.keys[item.name])]


def condition(config: ConditionConfig, *, stream: TextIO | None = None) -> ConditionResult:
    """Make the conditioning images of a folder of pictures: those that are missing, and those of changed pictures.

    It uses Ray as `fit` does. Killed at any moment, it continues where it stopped when it is run again.

    Args:
        config: which conditioning images, of which pictures.
        stream: where progress is shown; standard error by default.

    Returns:
        The result; its `folder` is a data set to train on.

    Raises:
        UserError: bad settings, pictures or captions (exit code 2 on the command line).
        RunError: it failed, as on a full disk; finished images stay (exit code 1).
        Interrupted: Ctrl-C or SIGTERM; finished images stay (exit code 130 or 143).
    """
    with shown_on(stream) as shown, end_told(shown, lambda: STANDS):
        try:
            return _condition(config, shown)
        except KeyboardInterrupt:
            raise Interrupted(f"Interrupted. {STANDS}") from None


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
    bad = _check_bad(task, [BadPicture(path, problems[name]) for path, name in task.names.items() if name in problems])
    left_out = {picture.path for picture in bad}
    kept = [row for row in task.rows if row.path not in left_out]
    task.out.write_metadata(_metadata_row(task, row) for row in kept)
    result = ConditionResult(
        task.out.path, len(kept), len(task.missing) - len(problems), bad, time.monotonic() - started
    )
    _report(task, result, stream)
    return result


def _check(config: ConditionConfig) -> _Task:
    """Check everything that can be checked before pictures are opened.

    Raises:
        ConfigError: with the problems of the two folders.
    """
    conditioning = config.out_folder / CONDITIONING
    if conditioning in (config.folder, *config.folder.parents):  # beside the pictures is fine
        problem = f"its folder {CONDITIONING} holds the pictures; name another folder"
        raise ConfigError([f"--out={config.out_folder}: {problem}"])
    recipe = Recipe(config.condition, config.resolution, config.options)
    rows = find_rows(config, config.out_folder)
    task = _Task(config, recipe, rows, ConditionFolder(config.out_folder))
    if lost := shorten([f"{path} exists" for path in task.out.foreign_files(task.keys)], "files exist"):
        lost.append(
            f"--out={task.out.path}: these files were not written by `raycontrolnet condition`, or were changed since, "
            "and would be overwritten; name another folder"
        )
        raise ConfigError(lost)
    if no_folder := unwritable(task.out.path, "out"):
        raise ConfigError([no_folder])
    return task


def _make(task: _Task, stream: TextIO) -> dict[str, str]:
    """Make the missing images. Return name of the conditioning image -> why its picture cannot be used."""
    task.out.remove_leftovers()
    task.out.begin([item.name for item in task.missing])
    problems: dict[str, str] = {}
    seen = [item.picture for item in task.missing[:: -(-len(task.missing) // LOOKED_AT_PICTURES)]]
    pictures = SharedFiles.of(f"--images={task.config.folder}", [str(task.config.folder), *seen])
    with ray_session(task.config.address):
        counter = Counter(task.config.condition, "images", len(task.names), len(task.names) - len(task.missing), stream)
        try:
            for outcomes in make_on_ray(task.missing, task.recipe, str(task.out.conditioning), pictures):
                problems |= {done.name: done.problem for done in outcomes if done.problem is not None}
                _record(task, [done for done in outcomes if done.problem is None])
                counter.advance(len(outcomes))
        finally:
            counter.close()
    return problems


def _record(task: _Task, outcomes: Sequence[Outcome]) -> None:
    """Add finished images to the journal.

    Raises:
        UserError: if one is not visible here: the machines do not share the folder.
    """
    made = {done.name: Made(task.keys[done.name], done.num_bytes) for done in outcomes}
    absent = [name for name, done in made.items() if not task.out.holds(name, done)]
    if absent:
        raise UserError(
            f"--out={task.out.path}: {task.out.conditioning / absent[0]} was written on another machine and is not "
            "visible here. Name a folder on storage that all machines share"
        )
    task.out.add(made)


def _check_bad(task: _Task, bad: Sequence[BadPicture]) -> tuple[BadPicture, ...]:
    """Write the list of bad pictures, and return them if the settings allow so many.

    Raises:
        DataError: with the list, if they do not.
    """
    config, total = task.config, len(task.names)
    allowed = int(config.max_bad_fraction * total) if config.on_bad_sample == "skip" else 0
    file = task.out.write_bad_pictures([picture.reason for picture in bad])
    if len(bad) <= allowed and len(bad) < total:
        return tuple(bad)
    limit = (
        f"more than --max_bad_fraction={config.max_bad_fraction:g} allows; repair or remove them, or raise it"
        if config.on_bad_sample == "skip"
        else "repair or remove them, or leave them out with --on_bad_sample skip"
    )
    lines = shorten([picture.reason for picture in bad], f"bad pictures (the whole list: {file})")
    lines.append(
        f"{len(bad):,} of {total:,} pictures cannot be used: {limit}. The conditioning images of the others are made"
    )
    raise DataError("\n".join(lines))


def _metadata_row(task: _Task, row: PictureRow) -> dict[str, object]:
    return {
        "image": Path(os.path.relpath(row.path, task.out.path)).as_posix(),
        "conditioning_image": f"{CONDITIONING}/{task.names[row.path]}",
        "text": row.text,
    }


def _announce(task: _Task, stream: TextIO) -> None:
    config, total = task.config, len(task.names)
    settings = "".join(f", {name.replace('_', ' ')} {value:g}" for name, value in config.options)
    there = total - len(task.missing)
    what = (
        f"{config.condition} of {total:,} pictures in {config.folder}, short side {config.resolution} px{settings}; "
        f"{there:,} exist already"
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
