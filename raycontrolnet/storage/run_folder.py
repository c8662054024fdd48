"""The folder of a run on a disk that all its machines see; see stored_folder for one in an object store."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.storage.checkpoint import Checkpoint
from raycontrolnet.storage.files import PARTIAL_SUFFIX, check_open, close_folder, is_closed


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run on a disk that all its machines see."""

    place: str
    """An absolute path."""

    @property
    def path(self) -> Path:
        """The folder to work in on this machine."""
        return Path(self.place)

    @property
    def shown(self) -> str:
        """The folder as users know it."""
        return self.place

    @property
    def is_stored(self) -> bool:
        """True if the folder is one of an object store."""
        return False

    @property
    def is_lost(self) -> bool:
        """True if another run has taken the folder over: this process changes nothing there any more."""
        return is_closed(self.path)

    def close(self, reason: str) -> None:
        """Change nothing in the folder from now on, in this process: each attempt raises OSError with the reason."""
        close_folder(self.path, reason)

    @property
    def parent(self) -> str:
        """The folder that this one is in, a path or URI."""
        return str(self.path.parent)

    @property
    def name(self) -> str:
        """The last part of its name."""
        return self.shown.rpartition("/")[2]

    def place_in(self, name: str) -> str:
        """Return the path or URI of what is called `name` in this folder."""
        return str(self.path / name)

    def place_of(self, checkpoint: Checkpoint) -> str:
        """Return the path or URI of a checkpoint in this folder, or of one that its run started from."""
        return str(checkpoint.path)

    def for_workers(self) -> RunFolder:
        """Return the folder for the workers of a run."""
        return self

    def child(self, name: str, role: str) -> RunFolder:
        """Return the folder of another run in this one.

        Args:
            role: name of the working folder on this machine, for an object store.
        """
        return RunFolder(str(self.path / name))

    def checkpoints(self, run_id: str | None = None) -> list[Checkpoint]:
        """Return the complete checkpoints, by step; with `run_id`, those that the run wrote."""
        return [each for each in checkpoints.all_checkpoints(self.path) if run_id in (None, each.run_id)]

    def latest(self, run_id: str | None = None) -> Checkpoint | None:
        """Return the complete checkpoint with most updates; with `run_id`, of those that the run wrote."""
        found = self.checkpoints(run_id)
        return found[-1] if found else None

    def latest_sound(self, run_id: str | None = None) -> Checkpoint | None:
        """Return the newest undamaged checkpoint, on this machine; see `checkpoint.latest_sound`."""
        return checkpoints.latest_sound(self.path, run_id)

    def last(self, run_id: str) -> Checkpoint | None:
        """Return the checkpoint from which a run goes on; one in an object store is not read, and may be damaged."""
        return self.latest(run_id) if self.is_stored else self.latest_sound(run_id)

    def sound(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return `checkpoint` on this machine, its bytes checked.

        Raises:
            ValueError: naming the damaged file.
            OSError: if it cannot be read.
        """
        found = Checkpoint.open(checkpoint.path)
        found.check_bytes()
        return found

    def write_checkpoint(self, **how: Any) -> Checkpoint:
        """Write a checkpoint; see `checkpoint.write`."""
        return checkpoints.write(self.path, former=self.checkpoints(), **how)

    def prune(self, limit: int | None) -> None:
        """Delete all but the `limit` checkpoints written last. Call it only when the newest is complete."""
        checkpoints.prune(self.path, limit)

    def state_of(self, name: str) -> list[int] | None:
        """Return size and time of a file, in an object store that of the store; None if there is none."""
        with suppress(FileNotFoundError):
            found = (self.path / name).stat()
            return [found.st_size, found.st_mtime_ns]
        return None

    def push(self, *patterns: str, tries: int | None = None) -> None:
        """Send the files to the store that match one of `patterns` and have changed since; `*` matches `/` too."""

    def pull(self, *patterns: str) -> None:
        """Make the files that match `patterns` those of the store."""

    def mirror(self, *patterns: str) -> None:
        """Make the store's files that match `patterns` those of this machine."""

    def clear(self, start: str | None) -> None:
        """Remove from this machine what an object store has: the run's files, and `start`, another run's checkpoint."""

    def delete(self, *patterns: str) -> None:
        """Delete the files that match one of `patterns`."""
        check_open(self.path)
        names = [pattern for pattern in patterns if "*" not in pattern]
        if len(names) < len(patterns):
            names += matching(files_in(self.path, folder_of(patterns)), patterns)
        for name in names:
            (self.path / name).unlink(missing_ok=True)


def files_in(folder: Path, inside: str = "") -> list[str]:
    """Return the names of the files in `folder`, or in its folder `inside`, at any depth, without unfinished ones."""
    found = []
    for where, _, names in os.walk(folder / inside):
        found += [Path(where, name).relative_to(folder).as_posix() for name in names]
    return [name for name in found if PARTIAL_SUFFIX not in name]


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return those of `names` that match one of `patterns`."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def folder_of(patterns: Sequence[str]) -> str:
    """Return the folder in which all files lie that match one of `patterns`; empty if they lie anywhere."""
    folders = [re.split(r"[*?[]", pattern)[0].rpartition("/")[0] for pattern in patterns]
    if any(folder.startswith(("/", "..")) for folder in folders):  # outside, as a logging_dir may be: nothing matches
        return ""
    return os.path.commonpath(folders or [""])
