"""The lock of a folder: one run at a time writes to it, on this machine or another that shares the disk."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from raycontrolnet.errors import ConfigError
from raycontrolnet.text import duration

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock.json"
BEAT_INTERVAL_S = 5.0
"""Time between two signs of life of the owner."""
DEAD_AFTER_S = 20.0
"""An owner on another machine without a sign of life for this long is dead."""
UNHEARD_AFTER_S = 120.0
"""A run on another machine without a sign of life for this long has ended: machines' clocks differ."""


_given_up: set[str] = set()
"""Tokens of the locks that this process has had: one that could not be removed is nobody's."""


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


class HeldLock:
    """A lock that this process holds, with signs of life; on a disk, or in an object store."""

    interval_s = BEAT_INTERVAL_S
    """Seconds between two signs of life."""
    dead_after_s = DEAD_AFTER_S
    """Seconds without a sign of life after which another run may take the folder over."""

    def __init__(self, owner: Owner, shown: str, close: Callable[[str], None]):
        """Begin to hold it.

        Args:
            owner: this process.
            shown: the folder's name in messages.
            close: ends all changes in the folder by this process; takes the reason.
        """
        self._owner, self._shown, self._close, self._beat = owner, shown, close, 0
        self._is_given_back = False
        self._seen_at = time.time()  # it counts the time that a machine sleeps
        self.lost: str | None = None
        """The reason why the folder is no longer this run's: another has taken it over, or may have."""

    def beat(self) -> None:
        """Give a sign of life; close the folder for this process if another run has, or may have, taken it over.

        A lock that is gone is written again, unless another run may have taken this one for dead, and ended since.

        Raises:
            OSError: if it cannot be read or written.
        """
        if self.lost or self._is_given_back:
            return
        found = self.found()
        silent = time.time() - self._seen_at
        if found and found.token != self._owner.token:
            self._lose(f"another run has taken the folder over: process {found.pid} on {found.host}")
        elif not found and silent >= self.dead_after_s:
            self._lose(
                f"another run may have taken the folder over, and ended: {LOCK_FILE} is gone there, and this run "
                f"gave no sign of life for {duration(silent)}"
            )
        else:
            self._beat += 1
            self.write()  # and see `written`

    def _lose(self, reason: str) -> None:
        self.lost = reason
        self._close(reason)
        logger.error("%s: %s", self._shown, reason)

    def give_up(self) -> None:
        """Let other runs of this process have the folder, even if the lock cannot be removed."""
        _given_up.add(self._owner.token)

    def release(self) -> None:
        """Give the lock back: remove it, if it is still this process's."""
        self._is_given_back = True  # first: a sign of life that is on its way is removed here, or by `written`
        self.remove()

    def written(self) -> None:
        """Remove a sign of life that was on its way when the lock was given back, in haste, and came after that."""
        if self._is_given_back:
            self.remove()

    def remove(self) -> None:
        """Remove the lock, if it is still this process's."""
        raise NotImplementedError

    def found(self) -> Owner | None:
        """Return the owner that the lock names; None if there is no lock."""
        raise NotImplementedError

    def write(self) -> None:
        """Write the lock, and call `written` once it is there."""
        raise NotImplementedError


def is_gone(process: Mapping[str, Any]) -> bool | None:
    """Check whether the process of `Owner.process` has ended; None if that cannot be seen from this machine."""
    pid, started = process.get("pid"), process.get("process_started")
    if process.get("machine") != _machine() or not isinstance(pid, int):
        return None
    return _process_started(pid) != started


def is_dead(owner: Owner) -> bool | None:
    """Check whether the run that had the lock has ended; None if that cannot be seen from this machine."""
    return owner.token in _given_up or is_gone(owner.process())


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


def in_use(shown: str, owner: Owner) -> ConfigError:
    """Return the error for a folder that another run has."""
    problem = (
        f"another run writes there: process {owner.pid} on {owner.host}, for {duration(time.time() - owner.since)}; "
        f"wait for its end, stop it, or name another --output_dir (if there is no such run, delete {LOCK_FILE} there)"
    )
    return ConfigError([f"--output_dir={shown}: {problem}"])


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
