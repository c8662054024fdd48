"""The lock of a folder: one run at a time writes to it, on this machine or another that shares the disk."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from raycontrolnet.errors import ConfigError
from raycontrolnet.text import duration

LOCK_FILE = ".lock.json"
BEAT_INTERVAL_S = 5.0
"""Time between two signs of life of the owner."""
DEAD_AFTER_S = 20.0
"""An owner on another machine without a sign of life for this long is dead."""
UNHEARD_AFTER_S = 120.0
"""A run on another machine without a sign of life for this long has ended: machines' clocks differ."""

SETTLED_AFTER_S = 0.2
"""Time in which others that found the same dead lock may still remove this one for it."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    host: str = field(default_factory=socket.gethostname)
    machine: str = field(default_factory=lambda: _machine())
    """Equal where process ids mean the same processes: neither after a restart nor in another container."""
    pid: int = field(default_factory=os.getpid)
    process_started: str = field(default_factory=lambda: _process_started(os.getpid()))
    """Start of the process, in the kernel's units: process ids are used again."""
    since: float = field(default_factory=time.time)
    """Unix seconds."""
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    beat: int = 0
    """Grows while the owner lives."""

    def process(self) -> dict[str, Any]:
        """Return what `is_gone` needs to know of this process."""
        return {name: getattr(self, name) for name in ("host", "machine", "pid", "process_started")}


class FolderLock:
    """A lock that this process holds, as a file in `folder`."""

    def __init__(self, folder: Path, owner: Owner):
        self._file, self._owner, self._beat = folder / LOCK_FILE, owner, 0

    def beat(self) -> None:
        """Give a sign of life."""
        with suppress(OSError):  # storage that fails for a moment
            found = _read(self._file)
            if found and found.token == self._owner.token:
                self._beat += 1
                # In place: the file must not come back if it is removed meanwhile.
                with self._file.open("r+") as file:
                    file.write(content_of(self._owner, self._beat))
                    file.truncate()

    def release(self) -> None:
        """Remove the file, if it is still this process's."""
        with suppress(OSError):
            found = _read(self._file)
            if found and found.token == self._owner.token:
                self._file.unlink()


def is_gone(process: Mapping[str, Any]) -> bool | None:
    """Check whether the process of `Owner.process` has ended; None if that cannot be seen from this machine."""
    pid, started = process.get("pid"), process.get("process_started")
    if process.get("machine") != _machine() or not isinstance(pid, int):
        return None
    return _process_started(pid) != started


def has_ended(folder: Path, process: Mapping[str, Any]) -> bool:
    """Check whether the process of `Owner.process`, which has held the lock of `folder`, has ended.

    On another machine its signs of life tell.
    """
    if (gone := is_gone(process)) is not None:
        return gone
    try:
        return time.time() - (folder / LOCK_FILE).stat().st_mtime > UNHEARD_AFTER_S
    except FileNotFoundError:
        return True
    except OSError:
        return False


@contextmanager
def locked(folder: Path, shown: str | None = None) -> Iterator[FolderLock]:
    """Hold the lock of `folder`, which is created if need be and removed again if it is then still empty.

    A lock whose owner is dead is taken over; on another machine it is watched for `DEAD_AFTER_S` first. Where no file
    can be written there is no lock either.

    Args:
        shown: the folder's name in messages; by default its path.

    Raises:
        ConfigError: another run has the folder.
    """
    owner = Owner()
    lock = FolderLock(folder, owner)
    is_new = not os.path.exists(folder)  # noqa: PTH110 (does not raise)
    try:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            _take(folder / LOCK_FILE, owner, shown or str(folder))
        yield lock
    finally:
        lock.release()
        if is_new:
            with suppress(OSError):  # it has files now
                folder.rmdir()


def _take(file: Path, owner: Owner, shown: str) -> None:
    while True:
        try:
            with file.open("x") as opened:
                opened.write(content_of(owner, 0))
        except FileExistsError:
            found = _read(file)
            if found is None:  # being written, or cut short
                time.sleep(1.0)
                found = _read(file)
            if found and _is_alive(found, file):
                raise in_use(shown, found) from None
            _remove(file, found)
        else:
            time.sleep(SETTLED_AFTER_S)
            if (settled := _read(file)) and settled.token == owner.token:
                return


def in_use(shown: str, owner: Owner) -> ConfigError:
    """Return the error for a folder that another run has."""
    problem = (
        f"another run writes there: process {owner.pid} on {owner.host}, for {duration(time.time() - owner.since)}; "
        f"wait for its end, stop it, or name another --output_dir (if there is no such run, delete {LOCK_FILE} there)"
    )
    return ConfigError([f"--output_dir={shown}: {problem}"])


def _is_alive(owner: Owner, file: Path) -> bool:
    gone = is_gone(owner.process())
    if gone is not None:
        return not gone
    until = time.monotonic() + DEAD_AFTER_S
    while time.monotonic() < until:
        time.sleep(1.0)
        if (now := _read(file)) and now != owner:
            return True
        if not file.exists():
            return False
    return False


def _remove(file: Path, dead: Owner | None) -> None:
    """Remove a dead owner's lock, but not one that another process has put in its place meanwhile."""
    aside = file.with_name(f"{LOCK_FILE}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        file.rename(aside)
        found = _read(aside)
        if found and (dead is None or found.token != dead.token):
            with suppress(FileExistsError):
                os.link(aside, file)
        aside.unlink()


def _read(file: Path) -> Owner | None:
    """Return the owner in a lock's file; None if there is none, or it was cut short by a full disk."""
    try:
        return owner_in(file.read_text())
    except OSError:
        return None


def owner_in(content: str) -> Owner | None:
    """Return the owner in a lock's content; None if it was cut short."""
    try:
        found = json.loads(content)
        return Owner(**{field.name: found[field.name] for field in fields(Owner)})
    except (ValueError, TypeError, KeyError):
        return None


def content_of(owner: Owner, beat: int) -> str:
    """Return the content of a lock."""
    return json.dumps(asdict(owner) | {"beat": beat})


def _machine() -> str:
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _process_started(pid: int) -> str:
    """Return when the process began; empty if it is gone."""
    with suppress(OSError, IndexError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else rest[18]
    if Path("/proc/self/stat").exists():
        return ""
    import psutil  # not for Linux: its times there change with the clock

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    return ""
