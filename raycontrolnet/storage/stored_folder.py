"""The folder of a run in an object store.

The program works in a folder of this machine, and what is written there is sent to the store, which alone counts: a run
continues from it on fresh machines. Driver and workers have working folders of their own, on one machine too, and know
of each other by the store alone.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.storage.checkpoint import MANIFEST_FILE, Checkpoint
from raycontrolnet.storage.files import remove_folder, replacing_folder, user_cache
from raycontrolnet.storage.object_store import ObjectStore, Stored, side_by_side
from raycontrolnet.storage.run_folder import RunFolder, files_in, folder_of, matching
from raycontrolnet.storage.uri import child_uri, is_uri, shown_uri, split_uri
from raycontrolnet.text import error_message

DRIVER, WORKER = "driver", "worker"
FETCHING_FILE = ".fetching"

_pushing = threading.Lock()
"""Else a file that grows could be sent by two threads, and the older state arrive last."""


@dataclass(frozen=True)
class StoredFolder(RunFolder):
    """The folder of a run in an object store; `place` is its URI."""

    role: str = DRIVER
    """Name of this process's working folder."""
    _pushed: dict[str, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)
    """Name -> size and time of the file that was sent last."""
    _pulled: dict[str, Stored] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def store(self) -> ObjectStore:
        """The folder in the store."""
        return ObjectStore(self.place)

    @property
    def path(self) -> Path:
        key = hashlib.blake2b(self.shown.encode(), digest_size=4).hexdigest()
        return user_cache() / "raycontrolnet" / "runs" / f"{self.name}-{key}" / self.role / self.name

    @property
    def shown(self) -> str:
        return shown_uri(self.place)

    @property
    def is_stored(self) -> bool:
        return True

    @property
    def is_lost(self) -> bool:
        return self.store.is_closed

    def close(self, reason: str) -> None:
        super().close(reason)
        self.store.close(reason)

    @property
    def parent(self) -> str:
        return split_uri(self.place)[0]

    def place_in(self, name: str) -> str:
        return child_uri(self.place, name)

    def place_of(self, checkpoint: Checkpoint) -> str:
        return checkpoint.uri or self.place_in(checkpoint.path.name)

    def for_workers(self) -> RunFolder:
        return StoredFolder(self.place, WORKER)

    def child(self, name: str, role: str) -> RunFolder:
        return StoredFolder(child_uri(self.place, name), role)

    def checkpoints(self, run_id: str | None = None) -> list[Checkpoint]:
        found = []
        for name, sizes in self._listed().items():
            with suppress(ValueError, FileNotFoundError):  # unfinished or damaged; or deleted meanwhile
                found.append(self._checkpoint(name, sizes))
        return sorted((each for each in found if run_id in (None, each.run_id)), key=lambda each: each.step)

    def latest_sound(self, run_id: str | None = None) -> Checkpoint | None:
        newest_first = reversed(self.checkpoints(run_id))
        return checkpoints.first_sound(newest_first, self.sound, lambda each: f"{self.shown}/{each.path.name}")

    def sound(self, checkpoint: Checkpoint) -> Checkpoint:
        if checkpoint.uri:
            found = self._folder_of(checkpoint.uri).sound(replace(checkpoint, uri=None))
            return replace(found, uri=checkpoint.uri)
        if checkpoint.path.parents[2].name != self.path.parents[1].name:  # of another folder, on a disk
            return super().sound(checkpoint)
        here = replace(checkpoint, path=self.path / checkpoint.path.name)
        with self.alone():
            with suppress(ValueError, OSError):
                found = super().sound(here)
                if found.manifest == checkpoint.manifest:
                    return found
            for other in self.path.glob("checkpoint-*"):
                remove_folder(other)
            with suppress(ValueError):  # damaged on its way
                self._download(here)
                return super().sound(here)
            self._download(here)
            return super().sound(here)

    def _folder_of(self, start: str) -> RunFolder:
        """Return the folder of the other run that has the checkpoint `start`, with a working folder for this run."""
        return folder_containing(start, f"{self.role}-of-{self.path.parents[1].name}")[0]

    def clear(self, start: str | None) -> None:
        for folder in (self, *((self._folder_of(start),) if start else ())):
            shutil.rmtree(folder.path.parent, ignore_errors=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes of this machine, which share its working folder, from fetching meanwhile."""
        from filelock import FileLock

        self.path.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path / FETCHING_FILE):
            yield

    def _download(self, here: Checkpoint) -> None:
        name, names = here.path.name, [*here.manifest["files"], MANIFEST_FILE]
        with replacing_folder(here.path) as partial:
            side_by_side(lambda each: self.store.download(f"{name}/{each}", partial / each), names)

    def start_anew(self) -> None:
        """Empty the working folder of what an earlier run left there, but keep its checkpoint."""
        for name in files_in(self.path):
            if not checkpoints.is_name(name.partition("/")[0]) and name != FETCHING_FILE:
                (self.path / name).unlink(missing_ok=True)

    def write_checkpoint(self, *, check: Callable[[], None] = lambda: None, **how: Any) -> Checkpoint:
        """Write a checkpoint, and send it to the store: its files first, then the manifest."""
        written = super().write_checkpoint(check=check, **how)
        name = written.path.name

        def send(file: str) -> None:
            check()
            self.store.upload(written.path / file, f"{name}/{file}")

        try:
            check()
            self.store.delete([f"{name}/{MANIFEST_FILE}"])  # of an earlier run that went further
            files = written.manifest["files"]
            side_by_side(send, files)
            sent = self._listed(name).get(name, {})
            for each, size in files.items():
                if sent.pop(each, None) != size:
                    raise OSError(f"{each} has not arrived whole")
            send(MANIFEST_FILE)
            self.store.delete(f"{name}/{each}" for each in sent if each != MANIFEST_FILE)
        except OSError as error:
            problem = f"--output_dir={self.shown}: {name} cannot be written there ({error_message(error, 200)})"
            raise OSError(problem) from None  # else the cause alone would be shown
        checkpoints.prune(self.path, 1)  # from which this machine goes on without fetching it
        return written

    def prune(self, limit: int | None) -> None:
        if limit is None:
            return
        for each in checkpoints.by_age(self.checkpoints())[:-limit]:
            name = each.path.name
            # The manifest at first: a deletion that is cut short leaves no checkpoint.
            self.store.delete([f"{name}/{MANIFEST_FILE}"])
            self.store.delete_folder(name)

    def state_of(self, name: str) -> list[int] | None:
        found = self.store.find([name]).get(name)
        return list(found) if found else None

    def push(self, *patterns: str, tries: int | None = None) -> None:
        def send(name: str) -> None:
            file = self.path / name
            with suppress(FileNotFoundError):  # removed meanwhile
                state = _state(file)
                if self._pushed.get(name) != state:
                    self.store.upload(file, name, tries)
                    self._pushed[name] = state

        with _pushing:
            side_by_side(send, self._here(patterns))

    def pull(self, *patterns: str) -> None:
        there = self._there(patterns)
        records = [name for name in there if name.endswith(".jsonl")]  # which may say that the others are there
        for names in (there.keys() - records, records):
            side_by_side(lambda name: self._fetch(name, there[name]), names)
        for name in set(self._here(patterns)) - there.keys():
            (self.path / name).unlink(missing_ok=True)
            self._pulled.pop(name, None)

    def mirror(self, *patterns: str) -> None:
        self.push(*patterns)
        self.store.delete(self._there(patterns).keys() - set(self._here(patterns)))

    def delete(self, *patterns: str) -> None:
        super().delete(*patterns)
        self.store.delete(self._there(patterns))

    def _here(self, patterns: Sequence[str]) -> list[str]:
        """Return the names of this machine's files that match one of `patterns`."""
        return matching(files_in(self.path, folder_of(patterns)), patterns)

    def _there(self, patterns: Sequence[str]) -> dict[str, Stored]:
        """Return name -> object, of the store's files that match one of `patterns`."""
        if not any("*" in pattern for pattern in patterns):
            return self.store.find(patterns)
        listed = self.store.list(folder_of(patterns))
        return {name: listed[name] for name in matching(listed, patterns)}

    def _fetch(self, name: str, stored: Stored) -> None:
        file = self.path / name
        if self._pulled.get(name) == stored and file.exists():
            return
        with suppress(FileNotFoundError):  # deleted meanwhile
            if not self._grown(name, stored):
                self.store.download(name, file)
            self._pulled[name] = stored
            self._pushed[name] = _state(file)

    def _grown(self, name: str, stored: Stored) -> bool:
        """Add to a file what it lacks, if it only grows: who follows it goes on where he was."""
        file = self.path / name
        if not file.exists() or file.stat().st_size >= stored.size:
            return False
        before, now = file.read_bytes(), self.store.read(name)
        if not now.startswith(before):
            return False
        with file.open("ab") as grown:
            grown.write(now[len(before) :])
        return True

    def _listed(self, prefix: str = "") -> dict[str, dict[str, int]]:
        """Return checkpoint's name -> file's name -> bytes, of all objects in folders with a checkpoint's name."""
        found: dict[str, dict[str, int]] = {}
        for name, stored in self.store.list(prefix).items():
            folder, _, file = name.partition("/")
            if checkpoints.is_name(folder):
                found.setdefault(folder, {})[file] = stored.size
        return found

    def _checkpoint(self, name: str, sizes: dict[str, int]) -> Checkpoint:
        if MANIFEST_FILE not in sizes:
            raise ValueError(f"has no {MANIFEST_FILE}, so it was not finished")
        manifest = self.store.read(f"{name}/{MANIFEST_FILE}").decode(errors="replace")
        return Checkpoint.of(self.path / name, manifest, sizes.get)


def run_folder(place: str) -> RunFolder:
    """Return the folder that a path or URI names."""
    return StoredFolder(place) if is_uri(place) else RunFolder(place)


def folder_containing(uri: str, role: str) -> tuple[RunFolder, str]:
    """Return the run's folder that `uri` is, or lies in as a checkpoint or its controlnet/; and the path in it.

    Args:
        role: name of the working folder on this machine.
    """
    parent, name = split_uri(uri)
    if checkpoints.is_name(name):
        return StoredFolder(parent, role), f"{name}/"
    grandparent, checkpoint = split_uri(parent)
    if name == checkpoints.CONTROLNET_FOLDER and checkpoints.is_name(checkpoint):
        return StoredFolder(grandparent, role), f"{checkpoint}/{name}/"
    return StoredFolder(uri, role), ""


def _state(file: Path) -> tuple[int, int]:
    """Return what differs once a file has been changed."""
    found = file.stat()
    return found.st_size, found.st_mtime_ns
