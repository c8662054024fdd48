"""Checkpoints: whole or not at all.

    checkpoint-N/
        controlnet/            in diffusers' form: the weights, or their averages (--use_ema)
        controlnet_raw/        in diffusers' form: the weights that go on training, beside averages of them
        training_state.pt      optimizer, schedule and loss scaler
        manifest.json          written last: what the run was, and every file with its size and SHA-256

A checkpoint is written beside its place and renamed into it: a folder `checkpoint-N` with a manifest whose files have
their sizes is complete. It is sound if their bytes are those that were written, which is checked where a run goes on.
The folders on disk are the only record of checkpoints.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from raycontrolnet.storage.files import (
    OLD_SUFFIX,
    PARTIAL_SUFFIX,
    readable_by_umask,
    remove_folder,
    replacing_folder,
    save_into,
    sha256_of,
    synced,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

FORMAT = 1
MANIFEST_FILE = "manifest.json"
CONTROLNET_FOLDER = "controlnet"
RAW_FOLDER = "controlnet_raw"
TRAINING_STATE_FILE = "training_state.pt"

_FACTS: dict[str, type | tuple[type, ...]] = {
    "files": dict,
    "step": int,
    "samples": int,
    "seed": int,
    "run_id": str,
    "written_at": (int, float),
}
"""Entries of every manifest."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    """Optimizer updates done."""
    samples: int
    """k: samples consumed; a continued run goes on with sample k."""
    seed: int
    run_id: str
    manifest: Mapping[str, Any]
    uri: str | None = None
    """URI of a checkpoint in an object store that is another run's than the one that starts from it."""

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Return the checkpoint at `path`.

        Raises:
            ValueError: if it is not complete, saying what is missing.
        """
        try:
            manifest = (path / MANIFEST_FILE).read_text()
        except FileNotFoundError:
            raise ValueError(f"has no {MANIFEST_FILE}, so it was not finished") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"its {MANIFEST_FILE} cannot be read ({error})") from None
        return Checkpoint.of(path, manifest, lambda name: _size(path / name))

    @staticmethod
    def of(path: Path, manifest_text: str, size_of: Callable[[str], int | None]) -> Checkpoint:
        """Return the checkpoint at `path` with this manifest.

        Args:
            size_of: returns the bytes of a file in it; None if there is none.

        Raises:
            ValueError: if it is not complete, saying what is missing.
        """
        try:
            manifest = json.loads(manifest_text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its {MANIFEST_FILE} cannot be read ({error})") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else "unknown"
            raise ValueError(f"its format is {found}, this version reads {FORMAT}")
        if unsaid := sorted(name for name, kind in _FACTS.items() if not isinstance(manifest.get(name), kind)):
            raise ValueError(f"its {MANIFEST_FILE} does not say {', '.join(unsaid)}")
        for name, size in manifest["files"].items():
            if (there := size_of(name)) is None:
                raise ValueError(f"{name} is missing")
            if there != size:
                raise ValueError(f"{name} is truncated: {there} of {size} bytes")
        return Checkpoint(path, manifest["step"], manifest["samples"], manifest["seed"], manifest["run_id"], manifest)

    @property
    def has_averages(self) -> bool:
        """True if it holds averages of the weights as well."""
        return any(name.startswith(f"{RAW_FOLDER}/") for name in self.manifest["files"])

    @property
    def trained_folder(self) -> Path:
        """Folder of the ControlNet that goes on training."""
        return self.path / (RAW_FOLDER if self.has_averages else CONTROLNET_FOLDER)

    def check_bytes(self) -> None:
        """Read all files, and compare their bytes with those that were written.

        Raises:
            ValueError: naming the damaged file.
        """
        written = self.manifest.get("sha256", {})  # versions before this one had none
        if not isinstance(written, dict) or not written.keys() <= self.manifest["files"].keys():
            raise ValueError(f"its {MANIFEST_FILE} is damaged")
        for name, digest in sha256_of(self.path, written).items():
            if digest != written[name]:
                raise ValueError(f"{name} is damaged: its bytes are not those that were written")


def name_of(step: int) -> str:
    return f"checkpoint-{step}"


def is_name(name: str) -> bool:
    """Check whether `name` is that of a checkpoint's folder."""
    return re.fullmatch(r"checkpoint-\d+", name) is not None


def all_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """Return the complete checkpoints of a run's folder, by step."""
    found = []
    for path in _folders(output_dir):
        with suppress(ValueError):  # unfinished or damaged
            found.append(Checkpoint.open(path))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _folders(output_dir: Path) -> list[Path]:
    """Return everything that has a checkpoint's name, by step."""
    numbered = [path for path in output_dir.glob("checkpoint-*") if is_name(path.name)]
    return sorted(numbered, key=lambda path: int(path.name.partition("-")[2]))


def latest(output_dir: Path, run_id: str | None = None) -> Checkpoint | None:
    """Return the complete checkpoint with most updates; with `run_id`, of those that the run wrote."""
    wanted = [c for c in all_checkpoints(output_dir) if run_id is None or c.run_id == run_id]
    return wanted[-1] if wanted else None


def latest_sound(output_dir: Path, run_id: str | None = None) -> Checkpoint | None:
    """Return the newest checkpoint that is complete and undamaged; with `run_id`, of those that the run wrote.

    Reads its files, and warns of newer ones that are damaged.

    Raises:
        OSError: if the files cannot be read now; another try may find them.
    """

    def opened(path: Path) -> Checkpoint | None:
        checkpoint = Checkpoint.open(path)
        if run_id not in (None, checkpoint.run_id):
            return None
        checkpoint.check_bytes()
        return checkpoint

    ours = (path for path in reversed(_folders(output_dir)) if (path / MANIFEST_FILE).exists())
    return first_sound(ours, opened, shown=str)


def first_sound(
    candidates: Iterable[T], opened: Callable[[T], Checkpoint | None], shown: Callable[[T], str]
) -> Checkpoint | None:
    """Return the first checkpoint that is undamaged, and warn of those before it.

    Args:
        opened: returns the checkpoint of a candidate, its bytes checked; None to pass it over. Raises ValueError for
            damage.
        shown: returns the place of a candidate, for the warnings.
    """
    damaged, found = [], None
    for candidate in candidates:
        try:
            found = opened(candidate)
        except ValueError as error:
            damaged.append(f"{shown(candidate)}: {error}")
        if found:
            break
    for problem in damaged:
        logger.warning("%s%s", problem, f"; {found.path.name} is used instead" if found else "")
    return found


def write(
    output_dir: Path,
    *,
    step: int,
    samples: int,
    seed: int,
    run_id: str,
    save: Callable[[Path], None],
    facts: Mapping[str, Any],
    former: Sequence[Checkpoint] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Write `checkpoint-<step>`.

    Args:
        save: writes the files into the folder it is given.
        facts: added to the manifest: settings, data, versions; no secrets.
        former: those that were written before; by default the complete ones in `output_dir`.
        check: called before it is completed; raises if it is not to be.
    """
    final = output_dir / name_of(step)
    former = all_checkpoints(output_dir) if former is None else former
    with replacing_folder(final) as partial:  # replaces one of an earlier run that went further, or a damaged one
        save_into(partial, save)
        readable_by_umask(partial)
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        for file in files:
            synced(file)
        manifest = {
            "format": FORMAT,
            "step": step,
            "samples": samples,
            "seed": seed,
            "run_id": run_id,
            "written_at": max([time.time(), *(_written_at(each) + 1e-3 for each in former)]),
            "files": {file.relative_to(partial).as_posix(): file.stat().st_size for file in files},
            "sha256": sha256_of(partial, [file.relative_to(partial).as_posix() for file in files]),
            **facts,
        }
        check()
        (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")
        synced(partial / MANIFEST_FILE)
    return Checkpoint.open(final)


def prune(output_dir: Path, limit: int | None) -> None:
    """Delete all but the `limit` checkpoints written last. Call it only when the newest is complete."""
    if limit is None:
        return
    for checkpoint in by_age(all_checkpoints(output_dir))[:-limit]:
        remove_folder(checkpoint.path)


def by_age(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return `checkpoints`, those written first at first."""
    return sorted(checkpoints, key=_written_at)


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _written_at(checkpoint: Checkpoint) -> float:
    """Return Unix seconds; later than those of earlier checkpoints even if the clock was put back."""
    return float(checkpoint.manifest["written_at"])


def remove_leftovers(output_dir: Path) -> None:
    """Delete what interrupted writes and deletions left; a complete checkpoint that is missing is put back."""
    for suffix in (PARTIAL_SUFFIX, OLD_SUFFIX):
        for path in output_dir.glob(f".checkpoint-*{suffix}"):
            final = output_dir / path.name[1:].removesuffix(suffix)
            with suppress(ValueError):
                if not final.exists():
                    Checkpoint.open(path)
                    path.rename(final)
                    continue
            shutil.rmtree(path, ignore_errors=True)
