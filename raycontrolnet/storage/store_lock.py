"""The lock of a folder in an object store: an object that names its owner, who writes it anew while it lives."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from raycontrolnet.storage.left_requests import LeftError, made_in_any_case
from raycontrolnet.storage.lock import LOCK_FILE, HeldLock, Owner, content_of, in_use, is_dead, owner_in
from raycontrolnet.storage.object_store import ObjectStore
from raycontrolnet.storage.store_requests import RUN_WAITS_S, reached

logger = logging.getLogger(__name__)

BEAT_INTERVAL_S = 10.0
DEAD_AFTER_S = 35.0
"""An owner on another machine without a sign of life for this long is dead."""
SETTLED_AFTER_S = 1.0
"""Time in which another that has seen no lock either may still write its own over this one: the last one stands."""


class StoreLock(HeldLock):
    """A lock that this process holds."""

    interval_s = BEAT_INTERVAL_S
    dead_after_s = DEAD_AFTER_S

    def __init__(self, store: ObjectStore, owner: Owner):
        super().__init__(owner, store.shown, store.close)
        self._store = store

    def found(self) -> Owner | None:
        return _read(self._store)

    def write(self) -> None:
        """Write the object, in one attempt."""
        began = time.time()
        self._store.write(LOCK_FILE, content_of(self._owner, self._beat).encode(), tries=1, then=self.written)
        self._seen_at = began

    def remove(self) -> None:
        """Remove the object, if it is still this process's; log why that fails.

        Raises:
            LeftError: a second signal has come.
        """
        try:
            found = _read(self._store)
            if found and found.token == self._owner.token:
                self._store.delete([LOCK_FILE])
                self._store.delete_if_empty()
        except LeftError:
            raise
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
    lock = StoreLock(store, owner)
    try:
        if other := _take(store, owner, lock):
            raise in_use(store.shown, other)
        with made_in_any_case(lock.release):
            time.sleep(SETTLED_AFTER_S)
            if (settled := _read(store)) and settled.token != owner.token:
                raise in_use(store.shown, settled)
            yield lock
    finally:
        lock.give_up()


def _take(store: ObjectStore, owner: Owner, lock: StoreLock) -> Owner | None:
    """Write `lock` where nobody alive has the folder; return the owner of one that is alive."""
    dead = None

    def attempt() -> Owner | None:
        nonlocal dead
        # Before each: another may have settled while an earlier attempt failed.
        found = _read(store, tries=1)
        if found and found != dead and found.token != owner.token:
            if _is_alive(found, store):
                return found
            dead = found
        lock.write()
        return None

    return reached(attempt, RUN_WAITS_S)


def _is_alive(owner: Owner, store: ObjectStore) -> bool:
    gone = is_dead(owner)
    if gone is not None:
        return not gone
    until = time.monotonic() + DEAD_AFTER_S
    while time.monotonic() < until:
        time.sleep(2.0)
        now = _read(store)
        if now != owner:
            return now is not None
    return False


def _read(store: ObjectStore, tries: int | None = None) -> Owner | None:
    try:
        return owner_in(store.read(LOCK_FILE, tries).decode(errors="replace"))
    except FileNotFoundError:
        return None
