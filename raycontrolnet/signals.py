"""Signals that end a run: Ctrl-C, and those of Slurm, Docker, Kubernetes, `ray job stop` and closed terminals."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a process without a word, unless they are handled."""
REACTION_S = 8.0
"""Time for the main thread to react to a signal, and to end."""

HASTE_S = 1.0
"""Time for an end in order after a second signal: for what would be waited for without it."""
END_S = 1.8
"""Time after a second signal at which a command ends in any case."""
LAST_S = 2.0
"""Time beyond haste for what is tried in any case, as the release of a lock; a command has `END_S` in all."""
LOOK_S = 0.1

_threads_left = threading.Event()
_last = signal.SIGINT
"""The signal that was raised last. Not carried by an exception: `ray.get` raises a KeyboardInterrupt of its own."""


class Haste:
    """The wish of a second signal: to wait for nothing any more."""

    def __init__(self) -> None:
        self._until = math.inf
        self._last: list[Callable[[], None]] = []

    def begin(self) -> None:
        """Give what is waited for `HASTE_S` from now on."""
        if not self.has_begun:
            self._until = time.monotonic() + HASTE_S
            _later(HASTE_S, self._do_last)

    @contextmanager
    def at_its_end(self, do: Callable[[], None]) -> Iterator[None]:
        """Call `do`, which takes no time, in another thread if haste is over while the `with` block still goes on.

        The main thread may hang in it. Of nested blocks the inner one comes first.
        """
        self._last.append(do)
        try:
            yield
        finally:
            self._last.remove(do)

    def _do_last(self) -> None:
        for do in reversed(tuple(self._last)):
            with suppress(OSError):
                do()

    @property
    def has_begun(self) -> bool:
        return self._until < math.inf

    @property
    def is_over(self) -> bool:
        """True if nothing is waited for any more."""
        return time.monotonic() >= self._until

    def wait(self, look: Callable[[float], bool], most_s: float | None = None) -> bool:
        """Wait until `look`, which is given seconds to wait, returns True; return its last answer.

        Args:
            most_s: to wait; None for as long as it takes. In haste it is less.
        """
        until = math.inf if most_s is None else time.monotonic() + most_s
        while not look(max(0.0, min(LOOK_S, until - time.monotonic()))):
            if self.is_over or time.monotonic() >= until:
                return look(0.0)
        return True

    def sleep(self, seconds: float) -> None:
        """Sleep, in haste for less."""

        def look(most_s: float) -> bool:
            time.sleep(most_s)
            return False

        self.wait(look, seconds)

    def left_s(self, most_s: float) -> float:
        """Return `most_s`, or what haste leaves of it."""
        return max(0.0, min(most_s, self._until - time.monotonic()))


@dataclass
class _Work:
    """The outermost piece of work in this process that signals end."""

    haste: Haste = field(default_factory=Haste)
    num_signals: int = 0
    sends_own: bool = False
    """True while a signal that this process has sent to itself is on its way; it is not counted."""
    last_words: Callable[[], None] = lambda: None
    depth: int = 0


_work = _Work()
_ends_process = False


def haste() -> Haste:
    """Return the haste of the work at hand."""
    return _work.haste


def is_watched() -> bool:
    """Check whether signals to this process end work in it, as in a driver, not in a worker on Ray."""
    return _work.depth > 0


@contextmanager
def process_ended_in_haste() -> Iterator[None]:
    """Let a second signal within the `with` block end this process after `END_S`, whatever it is at then.

    It is a command's, not a user's Python.
    """
    global _ends_process
    _ends_process = True
    try:
        yield
    finally:
        _ends_process = False


def leave_threads() -> None:
    """Note that threads of this process work in vain: a command that is interrupted ends without waiting for them."""
    _threads_left.set()


def end_if_threads_left(code: int) -> None:
    """End this process at once with `code` after `leave_threads`, as after haste: Python would wait for them."""
    if _threads_left.is_set():
        with suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)


def exit_code() -> int:
    """Return the exit code that a shell gives to the end by the last signal: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + _last


@contextmanager
def ending_signals_raised() -> Iterator[None]:
    """Let Ctrl-C and the signals of `ENDING` raise KeyboardInterrupt, in the main thread; elsewhere do nothing.

    Ignored ones, as SIGHUP under nohup, stay ignored. From the second on, nothing is waited for: see `haste`, which
    ends with the outermost block.
    """
    global _last, _work
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if not _work.depth:
        _last, _work = signal.SIGINT, _Work()
    _work.depth += 1
    try:
        with _handled((signal.SIGINT, *ENDING), lambda number, _: _note_and_raise(number)):
            yield
    finally:
        _work.depth -= 1
        if not _work.depth:
            if _work.haste.has_begun:
                leave_threads()
            _work = _Work()  # other work of this process, in any thread, has the time it needs


def _note_and_raise(number: int) -> NoReturn:
    _note(number)
    raise_interrupt(number)


def _note(number: int) -> bool:
    """Count a signal of others; return True for the first. At the second, haste begins."""
    if _work.sends_own:
        _work.sends_own = False
        return False
    _work.num_signals += 1
    if _work.num_signals == 2:
        _work.haste.begin()
        if _ends_process:
            _later(END_S, _end, number)
    return _work.num_signals == 1


def _end(number: int) -> None:
    """End the process."""
    say, _work.last_words = _work.last_words, lambda: None
    say()
    os._exit(128 + number)


def _later(seconds: float, do: Callable[..., object], *arguments: object) -> threading.Timer:
    timer = threading.Timer(seconds, do, arguments)
    timer.daemon = True
    timer.start()
    return timer


@contextmanager
def last_words(say: Callable[[], None]) -> Iterator[None]:
    """Let `say` be called, in another thread, before a second signal ends this process within the `with` block."""
    before, _work.last_words = _work.last_words, say
    try:
        yield
    finally:
        _work.last_words = before


@contextmanager
def ended_in_order(
    begin_end: Callable[[], bool],
    say_last: Callable[[], None] | None = None,
    *,
    look_s: float | None = None,
    still_ends: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """Let the first signal only begin an orderly end of the work in the `with` block, in the main thread.

    When the block is over, or at a second signal, it is raised as KeyboardInterrupt. If the main thread does not even
    react to that, as in a call to a Ray whose processes got the signal as well, the process ends.

    Args:
        begin_end: asks the work to end, and returns whether it will; if not, the signal is raised at once.
        say_last: called, in another thread, before the process ends, also some time after the `with` block.
        look_s: after a signal that is not Ctrl-C, time between two looks at the end; None to take none.
        still_ends: looks at it, in another thread; the signal is raised once it returns False.
    """
    noted: list[int] = []
    timers: list[threading.Timer] = []
    is_over: list[bool] = []

    def look(number: int) -> None:
        goes_on = still_ends()
        if is_over:
            return
        if goes_on:
            timers[:] = [_later(look_s or 0.0, look, number)]
            return
        timers[:] = [_later(REACTION_S, _end, number)]
        _work.sends_own = True
        os.kill(os.getpid(), number)

    def handle(number: int, _: FrameType | None) -> None:
        if not _note(number) or noted or not begin_end():
            raise_interrupt(number)
        noted.append(number)
        if look_s is not None and number != signal.SIGINT:
            timers.append(_later(look_s, look, number))

    _work.last_words = say_last or _work.last_words
    try:
        with _handled((signal.SIGINT, *ENDING), handle):
            yield
    finally:
        is_over.append(True)
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
