"""Requests to object stores, made in threads of their own: no signal interrupts a call of pyarrow."""

from __future__ import annotations

import atexit
import ctypes
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from contextlib import contextmanager, suppress
from typing import TypeVar

from raycontrolnet.signals import LAST_S, haste, is_watched, leave_threads

logger = logging.getLogger(__name__)

T = TypeVar("T")

END_S = 2.0
"""Time that the end of the process gives to requests that nobody waits for any more."""

_left: set[threading.Thread] = set()
_this_thread = threading.local()


class LeftError(OSError):
    """Nobody waits for the store any more: no other attempt is made."""


def unless_left(request: Callable[[], T]) -> T:
    """Return what `request` returns, unless a second signal or the end of the process comes first.

    It goes on then, in a thread that the process's end does not wait for: cut short, it would leave half an object.
    In a process that no signal of the user's ends, such as a worker on Ray, it is made directly.

    Raises:
        LeftError: it was left.
    """
    if not is_watched() or getattr(_this_thread, "makes_last", False):
        return request()
    hurry, done = haste(), Future[T]()
    if hurry.is_over:
        raise LeftError("a second signal has come")

    def make() -> None:
        try:
            result = request()
        except BaseException as error:  # noqa: BLE001 (who waits gets it)
            done.set_exception(error)
        else:
            done.set_result(result)

    def look(seconds: float) -> bool:
        with suppress(NotYetError):
            done.exception(seconds)
        return done.done() or not threading.main_thread().is_alive()

    thread = threading.Thread(target=make, name="request", daemon=True)
    thread.start()
    try:
        hurry.wait(look)
    finally:  # also where the first signal is raised at once
        if not done.done():
            _leave(thread)
    if not done.done():
        raise LeftError("it was not waited for any longer")
    return done.result()


@contextmanager
def made_here() -> Iterator[None]:
    """Let requests of this thread, which is one of a request's, be made in it, also after a second signal."""
    before, _this_thread.makes_last = getattr(_this_thread, "makes_last", False), True
    try:
        yield
    finally:
        _this_thread.makes_last = before


@contextmanager
def made_in_any_case(make: Callable[[], None]) -> Iterator[None]:
    """Call `make`, which makes requests that may be made twice, after the `with` block, also after a second signal.

    In haste it is called in a thread, which is waited for `LAST_S`; once haste is over, also if the block still goes
    on. Errors of the store are logged.
    """
    last, hurry = _LastRequests(make), haste()
    try:
        with hurry.at_its_end(last.begin):
            yield
    finally:
        done = False
        try:
            if not hurry.has_begun:
                with suppress(LeftError):
                    _logged(make)
                    done = True
        finally:  # also where a signal is raised meanwhile
            if not done:
                last.begin()
                last.wait()


class _LastRequests:
    """Requests that are made in a thread, once."""

    def __init__(self, make: Callable[[], None]):
        self._make, self._begun, self._until = make, threading.Lock(), 0.0
        self._runs = threading.Event()
        self._thread = threading.Thread(target=self._run, name="last requests", daemon=True)

    def begin(self) -> None:
        """Begin to make them, unless that was done before."""
        if self._begun.acquire(blocking=False):
            self._until = time.monotonic() + LAST_S
            self._thread.start()
            self._runs.set()

    def wait(self) -> None:
        """Return once they are made, or `LAST_S` after they were begun."""
        self._runs.wait(LAST_S)  # another thread may be about to begin them
        self._thread.join(max(0.0, self._until - time.monotonic()))
        if self._thread.is_alive():
            _leave(self._thread)

    def _run(self) -> None:
        _this_thread.makes_last = True
        _logged(self._make)


def _logged(make: Callable[[], None]) -> None:
    try:
        make()
    except LeftError:
        raise
    except OSError as error:
        logger.warning("the last requests: %s", error)


def _leave(thread: threading.Thread) -> None:
    if not any(each.is_alive() for each in _left):
        logger.warning("a request to an object store is left; the process's end waits %g s at most for it", END_S)
    if not _left:
        with suppress(RuntimeError):  # the process is ending
            atexit.register(_end_without_requests)  # runs before what pyarrow has registered
    _left.add(thread)
    leave_threads()


def _end_without_requests() -> None:
    """Let the process end without the requests that do not end: pyarrow and its threads would wait for them."""
    until = time.monotonic() + END_S
    for thread in _left:
        thread.join(max(0.0, until - time.monotonic()))
    if not any(thread.is_alive() for thread in _left):
        return
    from pyarrow import fs

    with suppress(AttributeError):  # a pyarrow without S3
        atexit.unregister(fs.ensure_s3_finalized)
    with suppress(OSError, AttributeError):  # as without glibc
        libc = ctypes.CDLL(None)
        libc.on_exit(libc._exit, None)  # with the exit code, before the threads of C++ are waited for
