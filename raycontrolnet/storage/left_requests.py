"""Requests to object stores, made in threads of their own: no signal interrupts a call of pyarrow."""

from __future__ import annotations

import atexit
import ctypes
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from contextlib import suppress
from typing import TypeVar

from raycontrolnet.signals import haste, is_watched, leave_threads

logger = logging.getLogger(__name__)

T = TypeVar("T")

END_S = 2.0
"""Time that the end of the process gives to requests that nobody waits for any more."""

_left: set[threading.Thread] = set()


class LeftError(OSError):
    """Nobody waits for the store any more: no other attempt is made."""


def unless_left(request: Callable[[], T]) -> T:
    """Return what `request` returns, unless a second signal or the end of the process comes first.

    It goes on then, in a thread that the process's end does not wait for: cut short, it would leave half an object.
    In a process that no signal of the user's ends, such as a worker on Ray, it is made directly.

    Raises:
        LeftError: it was left.
    """
    if not is_watched():
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
