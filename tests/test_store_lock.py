"""The lock of a run's folder in an object store, and what a run that has lost it may still do, by moto's server."""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from s3_server import BUCKET, S3Server, s3, use_s3

from raycontrolnet.errors import ConfigError
from raycontrolnet.signals import ending_signals_raised
from raycontrolnet.storage import lock, object_store, store_lock
from raycontrolnet.storage import uri as uri_module
from raycontrolnet.storage.lock import LOCK_FILE, Owner, content_of
from raycontrolnet.storage.object_store import ObjectStore
from raycontrolnet.storage.store_lock import DEAD_AFTER_S, StoreLock, store_locked

__all__ = ["s3", "use_s3"]  # fixtures

CHANGES = ("open_output_stream", "delete_file", "delete_dir")


class Clock:
    """The clock of `store_lock`: only sleeping takes time."""

    now = 1e9

    def time(self) -> float:
        return self.now

    monotonic = time

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (lock, store_lock):
        monkeypatch.setattr(module, "time", clock)
    for module in (object_store, store_lock):
        monkeypatch.setattr(module, "RUN_WAITS_S", (0.01,) * 5, raising=False)
    return clock


@pytest.fixture
def place(use_s3: S3Server, request: pytest.FixtureRequest) -> str:
    """URI of a folder of the test's own."""
    return f"s3://{BUCKET}/" + re.sub(r"\W", "-", request.node.name)


def token(place: str) -> str:
    return str(json.loads(ObjectStore(place).read(LOCK_FILE))["token"])


def fail_once(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None]) -> None:
    """Let the first request that changes something call `meanwhile`, and fail."""
    failed: list[bool] = []

    class FailingOnce:
        def __init__(self, system: Any):
            self._system = system

        def __getattr__(self, name: str) -> Any:
            return getattr(self._system, name) if failed or name not in CHANGES else self._fail

        def _fail(self, *_: object) -> None:
            failed.append(True)
            meanwhile()
            raise OSError("AWS Error SLOW_DOWN")

    def open_uri(uri: str) -> tuple[Any, str]:
        system, root = uri_module.open_uri(uri)
        return FailingOnce(system), root

    monkeypatch.setattr(object_store, "open_uri", open_uri)


def test_a_take_over_that_has_ended_is_seen(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a machine that slept: the other run came and went between two signs of life."""
    mine, other = ObjectStore(place), ObjectStore(place)
    with monkeypatch.context() as patch:
        patch.setattr(lock, "_machine", lambda: "another one")
        held = store_locked(mine)
        first = held.__enter__()
    with store_locked(other):
        other.write("weights", b"other's")
    first.beat()
    assert first.lost
    assert first.lost.startswith("another run may have taken the folder over, and ended: .lock.json is gone there, and")
    with pytest.raises(OSError, match="another run may have taken the folder over"):
        mine.write("weights", b"mine")
    first.beat()
    assert other.list().keys() == {"weights"}, "the folder is free"
    held.__exit__(None, None, None)
    assert other.read("weights") == b"other's"


def test_a_lock_that_somebody_has_deleted(place: str, clock: Clock) -> None:
    """Nobody can have taken a run for dead that has given a sign of life just now: it claims the folder again."""
    store = ObjectStore(place)
    with store_locked(store) as held:
        before = token(place)
        store.delete([LOCK_FILE])
        held.beat()
        assert (held.lost, token(place)) == (None, before)
        with pytest.raises(ConfigError, match="another run writes there"), store_locked(ObjectStore(place)):
            pass
        clock.sleep(DEAD_AFTER_S / 2)
        held.beat()
        store.delete([LOCK_FILE])
        clock.sleep(DEAD_AFTER_S * 0.75)
        held.beat()
        assert (held.lost, token(place)) == (None, before), "the last sign of life counts"
        store.write("weights", b"mine")
    assert store.list().keys() == {"weights"}


def test_signs_of_life_that_do_not_arrive(place: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not count; and an object that is still there has not been taken over, however late the next one is."""
    store = ObjectStore(place)
    with store_locked(store) as held:
        for deleted in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(StoreLock, "write", lambda _: clock.sleep(DEAD_AFTER_S / 2))
                held.beat()
                held.beat()
            if deleted:
                store.delete([LOCK_FILE])
            held.beat()
            assert bool(held.lost) is deleted


def test_a_sign_of_life_that_arrives_after_the_release(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it after a second signal: the lock is removed meanwhile, and again once it is there."""
    begun, goes_on, ended = threading.Event(), threading.Event(), threading.Event()
    arrived: list[bool] = []
    store, written = ObjectStore(place), StoreLock.written

    class Slow:
        def __init__(self, system: Any):
            self._system = system

        def __getattr__(self, name: str) -> Any:
            if name == "open_output_stream":
                begun.set()
                assert goes_on.wait(60)
            return getattr(self._system, name)

    def open_uri(uri: str) -> tuple[Any, str]:
        system, root = uri_module.open_uri(uri)
        return Slow(system), root

    def late(held: StoreLock) -> None:
        with suppress(OSError):
            held.beat()

    def written_and_ended(lock: StoreLock) -> None:
        arrived.append(store_has_lock(place))
        written(lock)
        ended.set()

    with ending_signals_raised():
        with store_locked(store) as held, monkeypatch.context() as patch:
            patch.setattr(object_store, "open_uri", open_uri)
            patch.setattr(StoreLock, "written", written_and_ended)
            beat = threading.Thread(target=late, args=(held,))
            beat.start()
            assert begun.wait(60)
            for _ in range(2):
                with suppress(KeyboardInterrupt):
                    signal.raise_signal(signal.SIGINT)
            beat.join()
        assert not store_has_lock(place)
        goes_on.set()
        assert ended.wait(60)
        assert arrived == [True]
        assert not store_has_lock(place)


def store_has_lock(place: str) -> bool:
    system, root = uri_module.open_uri(place)
    return bool(system.get_file_info(f"{root}/{LOCK_FILE}").type)


def test_a_late_write_gives_way(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first attempt failed, another run has settled; or one that is dead since; or the attempt did arrive."""
    alive, dead = Owner(), Owner(process_started="1")
    store = ObjectStore(place)

    def settle(owner: Owner) -> Callable[[], None]:
        return lambda: ObjectStore(place).write(LOCK_FILE, content_of(owner, 1).encode())

    with monkeypatch.context() as patch:
        fail_once(patch, settle(alive))
        with pytest.raises(ConfigError, match="another run writes there"), store_locked(store):
            pass
        assert token(place) == alive.token
    mine = Owner()
    monkeypatch.setattr(store_lock, "Owner", lambda: mine)
    for settled in (dead, mine):
        store.delete([LOCK_FILE])
        with monkeypatch.context() as patch:
            fail_once(patch, settle(settled))
            with store_locked(store):
                assert token(place) == mine.token
    assert not store.list()


def test_ctrl_c_while_it_settles(place: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook the process lives on: its lock must not."""

    def interrupted(_: float) -> None:  # not by a signal, whose handler a Tuner of another test may have left
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(clock, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt), store_locked(ObjectStore(place)):
            pass
    assert not ObjectStore(place).list()


CHANGED: dict[str, Callable[[ObjectStore], None]] = {
    "write": lambda store: store.write("a", b"mine"),
    "upload": lambda store: store.upload(Path(__file__), "a"),
    "delete": lambda store: store.delete(["a"]),
    "delete_folder": lambda store: store.delete_folder(""),
}


@pytest.mark.parametrize("name", CHANGED)
def test_no_attempt_begins_in_a_store_that_is_closed(name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an earlier attempt failed before it was closed."""
    store, other = ObjectStore(place), ObjectStore(place)
    other.write("a", b"other's")
    with monkeypatch.context() as patch:
        fail_once(patch, lambda: store.close("taken"))
        with pytest.raises(OSError, match=r"^taken$"):
            CHANGED[name](store)
    assert other.read("a") == b"other's"
    CHANGED[name](other)
