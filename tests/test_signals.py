"""Signals that end a run whose main thread reacts to nothing, as in a call to a Ray that is gone; and haste."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from processes import wait_for

from raycontrolnet import signals
from raycontrolnet.errors import Interrupted, end_told, explained
from raycontrolnet.signals import Haste
from raycontrolnet.storage import left_requests, object_store, store_lock
from raycontrolnet.storage import uri as uri_module
from raycontrolnet.storage.left_requests import LeftError, made_in_any_case, unless_left
from raycontrolnet.storage.lock import LOCK_FILE
from raycontrolnet.storage.object_store import ObjectStore
from raycontrolnet.storage.store_lock import store_locked

STUCK = """
import ctypes, os, signal, threading, time
from raycontrolnet import signals

libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)


def stuck(*_):
    libc.pthread_mutex_lock(mutex)  # waits for itself; no signal interrupts it


def last_words():
    print("last words", flush=True)

"""
IN_THE_WORK = """
signals.REACTION_S = 0.3
with signals.ended_in_order(lambda: True, last_words, look_s=0.2, still_ends=lambda: False):
    os.kill(os.getpid(), signal.SIGTERM)
    stuck()
"""
AFTER_A_SECOND = """
signals.raise_interrupt = stuck
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
in_order = signals.ended_in_order(lambda: True, last_words)
with signals.process_ended_in_haste(), signals.ending_signals_raised(), in_order:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""


@pytest.mark.parametrize("work", [IN_THE_WORK, AFTER_A_SECOND])
def test_a_process_that_does_not_react_ends_with_last_words(work: str) -> None:
    """Some time after one signal if the end does not come, or a command soon after a second one."""
    command = [sys.executable, "-c", STUCK + work]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (143, "last words\n", "")


def test_haste_ends_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "HASTE_S", 0.2)
    haste, never = Haste(), threading.Event()
    assert haste.left_s(10.0) == 10.0
    assert not haste.wait(never.wait, 0.3)
    threading.Timer(0.2, haste.begin).start()
    start = time.monotonic()
    haste.sleep(60.0)
    assert not haste.wait(never.wait)
    assert time.monotonic() - start < 30
    assert haste.left_s(10.0) == 0.0
    assert haste.wait(lambda _: True)


def test_a_request_is_left_in_haste_and_no_other_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "HASTE_S", 0.1)
    monkeypatch.setattr(left_requests, "_left", set())
    over, made = threading.Event(), list[str]()

    def missing() -> None:
        raise FileNotFoundError("there is none")

    with signals.ending_signals_raised():
        assert unless_left(lambda: 7) == 7
        with pytest.raises(FileNotFoundError, match="there is none"):
            unless_left(missing)
        threading.Timer(0.1, signals.haste().begin).start()
        with pytest.raises(LeftError):
            unless_left(over.wait)
        with pytest.raises(LeftError):
            unless_left(lambda: made.append("another"))
    assert not made
    with signals.ending_signals_raised():
        assert unless_left(lambda: 8) == 8, "in another piece of work"
    over.set()


def test_a_signal_of_our_own_is_no_second_one() -> None:
    """If Ray does not answer after SIGTERM, the main thread has `REACTION_S` for an end in order."""
    counted: list[int] = []
    with suppress(KeyboardInterrupt), signals.ending_signals_raised():
        try:
            with signals.ended_in_order(lambda: True, look_s=0.1, still_ends=lambda: False):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
        finally:
            assert not signals.haste().has_begun
            counted.append(signals._work.num_signals)
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            assert signals.haste().has_begun, "this one is another's"
    assert counted == [1]


def interrupted_twice() -> None:
    for _ in range(2):
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_haste_ends_with_its_work() -> None:
    with signals.ending_signals_raised():
        with signals.ending_signals_raised():
            interrupted_twice()
        assert signals.haste().has_begun, "the outer work is to end as well"
    assert not signals.haste().has_begun


def slow_store(monkeypatch: pytest.MonkeyPatch, folder: Path, latency_s: float) -> ObjectStore:
    """Return a store whose every request takes a while."""

    class Slow:
        def __init__(self, system: Any):
            self._system = system

        def __getattr__(self, name: str) -> Any:
            time.sleep(latency_s)
            return getattr(self._system, name)

    def open_uri(uri: str) -> tuple[Any, str]:
        system, root = uri_module.open_uri(uri)
        return Slow(system), root

    monkeypatch.setattr(object_store, "open_uri", open_uri)
    monkeypatch.setattr(store_lock, "SETTLED_AFTER_S", 0.0)
    monkeypatch.setattr(left_requests, "_left", set())
    folder.mkdir()
    return ObjectStore(folder.as_uri())


def test_a_lock_is_released_after_a_second_signal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the end comes so late that no other request is made any more."""
    store, lock = slow_store(monkeypatch, tmp_path / "store", 0.15), tmp_path / "store" / LOCK_FILE
    with signals.ending_signals_raised(), store_locked(store):
        assert lock.exists()
        interrupted_twice()
        time.sleep(signals.HASTE_S)
        assert signals.haste().is_over
        with pytest.raises(LeftError):
            store.read(LOCK_FILE)
        start = time.monotonic()
    assert time.monotonic() - start < 5 * signals.LAST_S
    assert not lock.exists()


def test_what_is_tried_in_any_case_does_not_wait_for_the_main_thread() -> None:
    """A command is ended 0.8 s later."""
    made: list[str] = []
    with signals.ending_signals_raised(), made_in_any_case(lambda: made.append("now")):
        interrupted_twice()
        wait_for(lambda: bool(made), 30)
    assert made == ["now"], "once"


def test_a_lock_that_could_not_be_released_is_nobody_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As of a store that did not answer, in a notebook, whose process lives on."""
    store, lock = slow_store(monkeypatch, tmp_path / "store", 0.0), tmp_path / "store" / LOCK_FILE
    with monkeypatch.context() as patch, suppress(PermissionError), store_locked(store):
        patch.setattr(ObjectStore, "delete", lambda *_: (_ for _ in ()).throw(OSError("AWS Error SLOW_DOWN")))
    assert lock.exists()
    with store_locked(store):
        pass
    assert not lock.exists()


def test_what_stands_is_said_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, said, put_down = list[int](), io.StringIO(), list[str]()
    monkeypatch.setattr(os, "_exit", codes.append)
    with end_told(said, lambda: "of the command"):
        with end_told(said, lambda: "All of it stands.", lambda: put_down.append("interrupted")):
            signals._end(signal.SIGINT)
        assert (codes, said.getvalue(), put_down) == ([130], "\nInterrupted. All of it stands.\n", ["interrupted"])


def test_an_interruption_tells_nothing_of_the_work_before() -> None:
    """In a notebook, the next run is begun while the end of the first is handled."""

    def work(*, second_signal: bool) -> None:
        with explained("Work", lambda: "outside"):
            try:
                if second_signal:
                    raise Interrupted("inside")
            finally:
                raise KeyboardInterrupt

    for second_signal, told in ((False, "outside"), (True, "inside")):
        try:
            raise Interrupted("before")
        except Interrupted:
            with pytest.raises(Interrupted, match=told):
                work(second_signal=second_signal)
