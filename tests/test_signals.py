"""Signals that end a run whose main thread reacts to nothing, as in a call to a Ray that is gone; and haste."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from raycontrolnet import signals
from raycontrolnet.signals import Haste
from raycontrolnet.storage import left_requests
from raycontrolnet.storage.left_requests import LeftError, unless_left

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
signals.end_process_in_haste()
signals.raise_interrupt = stuck
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
with signals.ending_signals_raised(), signals.ended_in_order(lambda: True, last_words):
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
