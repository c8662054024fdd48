"""Signals that end a run whose main thread reacts to nothing, as in a call to a Ray that is gone."""

from __future__ import annotations

import subprocess
import sys

STUCK = """
import ctypes, os, signal
from raycontrolnet import signals

signals.REACTION_S = 0.3
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with signals.ended_in_order(lambda: True, 0.2, lambda: print("last words", flush=True)):
    os.kill(os.getpid(), signal.SIGTERM)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # waits for itself; no signal interrupts it
"""


def test_a_process_that_does_not_react_ends_with_last_words() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (143, "last words\n", "")
