"""Signals that end a run: Ctrl-C, and those of Slurm, Docker, Kubernetes, `ray job stop` and closed terminals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a process without a word, unless they are handled."""


REACTION_S = 8.0
"""Time for the main thread to react to a signal, and to end."""

_threads_left = threading.Event()
_last = signal.SIGINT
"""The signal that was raised last. Not carried by an exception: `ray.get` raises a KeyboardInterrupt of its own."""


def leave_threads() -> None:
    """Note that threads of this process work in vain: a command that is interrupted ends without waiting for them."""
    _threads_left.set()


def end_if_threads_left(code: int) -> None:
    """End this process at once with `code` if `leave_threads` was called: Python would wait for the threads."""
    if _threads_left.is_set():
        os._exit(code)


def exit_code() -> int:
    """Return the exit code that a shell gives to the end by the last signal: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + _last


@contextmanager
def ending_signals_raised() -> Iterator[None]:
    """Let the signals of `ENDING` raise KeyboardInterrupt as Ctrl-C does, in the main thread; elsewhere do nothing.

    Ignored ones, as SIGHUP under nohup, stay ignored.
    """
    global _last
    _last = signal.SIGINT
    with _handled(ENDING, lambda number, _: raise_interrupt(number)):
        yield


@contextmanager
def ended_in_order(
    begin_end: Callable[[], bool], grace_s: float | None = None, last_words: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Let the first signal only begin an orderly end of the work in the `with` block, in the main thread.

    When the block is over, or at a second signal, it is raised as KeyboardInterrupt; if it is not Ctrl-C, also after
    `grace_s`: who sends others waits only so long. If the main thread does not even react to that, as in a call to a
    Ray whose processes got the signal as well, the process ends.

    Args:
        begin_end: asks the work to end, and returns whether it will; if not, the signal is raised at once.
        last_words: called, in another thread, before the process ends.
    """
    noted: list[int] = []

    def end(number: int) -> None:
        last_words()
        os._exit(128 + number)

    def handle(number: int, _: FrameType | None) -> None:
        if noted or not begin_end():
            raise_interrupt(number)
        noted.append(number)
        if grace_s is not None and number != signal.SIGINT:
            timers.append(threading.Timer(grace_s, os.kill, (os.getpid(), number)))
            timers.append(threading.Timer(grace_s + REACTION_S, end, (number,)))
            for timer in timers:
                timer.daemon = True
                timer.start()

    timers: list[threading.Timer] = []
    try:
        with _handled((signal.SIGINT, *ENDING), handle):
            yield
    finally:
        for timer in timers:
            timer.cancel()
    if noted:
        raise_interrupt(noted[0])


@contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread gets signals
        return
    before = {number: signal.getsignal(number) for number in numbers}
    # None: set by other than Python code.
    changed = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in changed:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)


def raise_interrupt(number: int) -> NoReturn:
    """Raise KeyboardInterrupt for the signal `number`."""
    global _last
    _last = signal.Signals(number)
    raise KeyboardInterrupt
