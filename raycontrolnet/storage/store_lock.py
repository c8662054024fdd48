"""The lock of a folder in an object store: an object that names its owner, who writes it anew while it lives."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from raycontrolnet.storage.lock import LOCK_FILE, Owner, content_of, in_use, is_gone, owner_in
from raycontrolnet.storage.object_store import ObjectStore

logger = logging.getLogger(__name__)

BEAT_INTERVAL_S = 10.0
DEAD_AFTER_S = 35.0
"""An owner on another machine without a sign of life for this long is dead."""
SETTLED_AFTER_S = 1.0
"""Time in which another that has seen no lock either may still write its own over this one: the last one stands."""


class StoreLock:
    """A lock that this process holds."""

    interval_s = BEAT_INTERVAL_S

    def __init__(self, store: ObjectStore, owner: Owner):
        self._store, self._owner, self._beat = store, owner, 0
        self.lost_to: Owner | None = None
        """The run that has taken the folder over, from one whose signs of life did not arrive."""

    def beat(self) -> None:
        """Give a sign of life; close the store for this process if another run has taken the folder over."""
        found = _read(self._store)
        if found and found.token == self._owner.token:
            self._beat += 1
            self._store.write(LOCK_FILE, content_of(self._owner, self._beat).encode(), tries=1)
        elif found and self.lost_to is None:
            self.lost_to = found
            self._store.close(f"process {found.pid} on {found.host} has taken the folder over")
            logger.error("%s: process %d on %s has taken the folder over", self._store.shown, found.pid, found.host)

    def release(self) -> None:
        """Remove the object, if it is still this process's."""
        try:
            found = _read(self._store)
            if found and found.token == self._owner.token:
                self._store.delete([LOCK_FILE])
                self._store.delete_if_empty()
        except OSError as error:
            logger.warning("%s/%s stays there (%s)", self._store.shown, LOCK_FILE, error)


@contextmanager
def store_locked(store: ObjectStore) -> Iterator[StoreLock]:
    """Hold the lock of the folder `store`.

    Raises:
        ConfigError: another run has the folder.
        OSError: if the store cannot be read or written.
    """
    owner = Owner()
    found = _read(store)
    if found and _is_alive(found, store):
        raise in_use(store.shown, found)
    store.write(LOCK_FILE, content_of(owner, 0).encode())
    time.sleep(SETTLED_AFTER_S)
    if (settled := _read(store)) and settled.token != owner.token:
        raise in_use(store.shown, settled)
    lock = StoreLock(store, owner)
    try:
        yield lock
    finally:
        lock.release()


def _is_alive(owner: Owner, store: ObjectStore) -> bool:
    gone = is_gone(owner.process())
    if gone is not None:
        return not gone
    until = time.monotonic() + DEAD_AFTER_S
    while time.monotonic() < until:
        time.sleep(2.0)
        now = _read(store)
        if now != owner:
            return now is not None
    return False


def _read(store: ObjectStore) -> Owner | None:
    try:
        return owner_in(store.read(LOCK_FILE).decode(errors="replace"))
    except FileNotFoundError:
        return None
