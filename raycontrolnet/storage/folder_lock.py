"""The lock of a folder on a disk, as a file in it; for one in an object store see store_lock."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from raycontrolnet.storage.files import close_folder, removed_if_empty, reopen_folder
from raycontrolnet.storage.lock import DEAD_AFTER_S, LOCK_FILE, HeldLock, Owner, content_of, in_use, is_dead, owner_in

SETTLED_AFTER_S = 0.2
"""Time in which others that found the same dead lock may still remove this one for it."""


class FolderLock(HeldLock):
    """A lock that this process holds, as a file in `folder`."""

    def __init__(self, folder: Path, owner: Owner, shown: str, close: Callable[[str], None]):
        super().__init__(owner, shown, close)
        self._file, self.is_held = folder / LOCK_FILE, False
        """`is_held` is false where no file can be written: nobody else has the folder then."""

    def beat(self) -> None:
        """Give a sign of life, as `HeldLock.beat`; storage that fails for a moment gets the next one."""
        if self.is_held:
            with suppress(OSError):
                super().beat()

    def found(self) -> Owner | None:
        try:
            content = self._file.read_text()
        except FileNotFoundError:
            if self._file.parent.is_dir():
                return None
            self._seen_at = time.time()  # nobody has a folder that is gone
            raise
        if (found := owner_in(content)) is None:
            raise OSError(f"{self._file} is being written")
        return found

    def write(self) -> None:
        began, content = time.time(), content_of(self._owner, self._beat)
        try:
            with self._file.open("r+") as file:  # in place: it is never seen cut short
                file.write(content)
                file.truncate()
        except FileNotFoundError:
            with self._file.open("x") as file:  # another's, which is there by now, stays
                file.write(content)
        self._seen_at = began
        self.written()

    def remove(self) -> None:
        with suppress(OSError):
            found = _read(self._file)
            if found and found.token == self._owner.token:
                self._file.unlink()


@contextmanager
def locked(folder: Path, shown: str | None = None, close: Callable[[str], None] | None = None) -> Iterator[FolderLock]:
    """Hold the lock of `folder`, which is created if need be and removed again if it is then still empty.

    A lock whose owner is dead is taken over; on another machine it is watched for `DEAD_AFTER_S` first. Where no file
    can be written there is no lock either.

    Args:
        shown: the folder's name in messages; by default its path.
        close: ends all changes in the folder by this process, once another run has taken it over; takes the reason.

    Raises:
        ConfigError: another run has the folder.
    """
    owner, shown = Owner(), shown or str(folder)
    lock = FolderLock(folder, owner, shown, close or partial(close_folder, folder))
    with removed_if_empty(folder):
        try:
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                _take(folder / LOCK_FILE, owner, shown)
                lock.is_held = True
            reopen_folder(folder)  # an earlier run of this process may have lost it
            yield lock
        finally:
            lock.give_up()
            lock.release()


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


def _is_alive(owner: Owner, file: Path) -> bool:
    gone = is_dead(owner)
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
