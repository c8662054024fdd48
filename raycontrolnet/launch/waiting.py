"""News of a run whose workers have not started yet, and a limit to the wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from raycontrolnet.cluster.resources import WorkerResources, no_cpu_for_loading, wanted_and_there
from raycontrolnet.errors import RunError
from raycontrolnet.text import duration
from raycontrolnet.training.background import repeating

FIRST_NEWS_S = 30.0
LOOK_INTERVAL_S = 2.0
LOADING_LOOK_S = 10.0
"""Time between questions to Ray while a run goes on."""


class _Wait:
    """A wait that is told of after 30 s, 1, 2, 4 minutes and so on."""

    def __init__(self) -> None:
        self._start, self._next_news = time.monotonic(), FIRST_NEWS_S

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def has_news(self) -> bool:
        """Return True if it is time to tell of it, once each time."""
        if self.seconds < self._next_news:
            return False
        self._next_news *= 2
        return True


class _LoadingNews:
    """News of a run whose workers have their places, while no CPU is left to load their data."""

    def __init__(self, stream: TextIO):
        self._stream, self._next_look = stream, 0.0
        self._wait: _Wait | None = None

    def look(self) -> None:
        """Ask Ray now and then; say what it is when it is time."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + LOADING_LOOK_S
        if (problem := no_cpu_for_loading()) is None:
            self._wait = None
            return
        wait = self._wait = self._wait or _Wait()
        if wait.has_news():
            self._stream.write(f"waiting for data, {duration(wait.seconds)}: {problem}\n")


@contextmanager
def waiting_for_workers(
    is_waiting: Callable[[], bool],
    abort: Callable[[], None],
    resources: WorkerResources,
    limit_s: float | None,
    stream: TextIO,
) -> Iterator[None]:
    """Say on `stream` what a run waits for: after 30 s, 1, 2, 4 minutes and so on.

    It waits while its workers have no place, or while other runs' workers leave no CPU for loading data.

    Args:
        is_waiting: tells whether they have none, at the start or after a loss.
        abort: ends the run, whose `with` block then raises.
        limit_s: seconds of waiting after which the run is ended.

    Raises:
        RunError: the limit was reached.
    """
    wait, too_late = _Wait(), ""
    loading = _LoadingNews(stream)

    def look() -> None:
        nonlocal wait, too_late
        if too_late:
            abort()  # and again: there may have been nothing to abort yet
            return
        if not is_waiting():
            wait = _Wait()
            loading.look()
            return
        if limit_s is not None and wait.seconds >= limit_s:
            too_late = (
                f"The workers have not started within --wait_timeout_s={limit_s:g}: {wanted_and_there(resources)}"
            )
            abort()
        elif wait.has_news():
            stream.write(f"waiting for workers, {duration(wait.seconds)}: {wanted_and_there(resources)}\n")

    try:
        with repeating(look, LOOK_INTERVAL_S, "waiting"):
            yield
    except Exception as error:
        if too_late:
            raise RunError(f"{too_late}. Lower --num_workers, or wait longer") from error
        raise
