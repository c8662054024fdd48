"""A watchdog that ends a worker which hangs, as in a collective with a lost worker, so that Ray starts it again."""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.text import duration
from raycontrolnet.training.background import repeating
from raycontrolnet.training.failures import HANG_FILE, record_hang
from raycontrolnet.training.job import Job
from raycontrolnet.training.run_log import log_of
from raycontrolnet.training.saver import writes_finished
from raycontrolnet.training.signs_of_life import Position, SignsOfLife
from raycontrolnet.training.whereabouts import whereabouts

logger = logging.getLogger(__name__)

SENDING_S = 20.0
"""Time to tell an object store of a hang."""
LOOKS, MOST_LOOK_S = 20, 60.0
"""Looks in the time that is allowed, which may be without end, and seconds between two at most."""
READING, FIRST_COLLECTIVE, PREPARATIONS = "the reading of the models", "the first collective", "the preparations"
UPDATE = "an update"
UNKNOWN = "by itself, or in waiting for another"
START_TIMES, LEAST_START_S = 3, 900.0
"""Times as long, and at least so long, everything may take until the first update is done: kernels are compiled."""
LEAST_COLLECTIVE_S = 1800
"""Ray Train's own limit to a collective."""
MOST_COLLECTIVE_S = 10**8


def start_timeout_s(hang_timeout_s: float) -> float:
    """Return the seconds without progress that are allowed until the first update is done."""
    return max(LEAST_START_S, START_TIMES * hang_timeout_s)


def collective_timeout_s(hang_timeout_s: float) -> int:
    """Return the seconds after which torch gives a collective up: later than a watchdog, which names its worker."""
    later = start_timeout_s(hang_timeout_s) + hang_timeout_s
    return int(min(max(LEAST_COLLECTIVE_S, later), MOST_COLLECTIVE_S))


class Clock(NamedTuple):
    """A clock that runs while something is done."""

    phase: str = ""
    """Name of what is done; empty before the first."""
    since: float = 0.0
    limit_s: float = math.inf


class Watchdog:
    """A clock that `progress` starts and puts back; when it has run for too long, this process ends.

    Args:
        who: names the worker, for messages.
        log: gets the stacks of all threads.
        timeout_s: allowed without progress; `start_timeout_s` of it until the first update is done.
        signs: of the run's workers; None if this is the only one.
    """

    def __init__(self, who: str, folder: RunFolder, log: Path, timeout_s: float, signs: SignsOfLife | None = None):
        self.who, self.folder, self.log, self.timeout_s, self.signs = who, folder, log, timeout_s, signs
        # Replaced as a whole: another thread reads it.
        self.clock = Clock()
        self._limit_s = start_timeout_s(timeout_s)
        self._is_over = self._waits_for_data = False
        self._update, self._left = 0, 0
        self._thread = threading.get_ident()
        self._looked = self._resumed = 0.0

    def progress(self, phase: str, *, timed: bool = True) -> None:
        """Note that something was done, and what is being done now; if not `timed`, it may take as long as it does."""
        self.clock = Clock(phase, time.monotonic(), self._limit_s if timed else math.inf)

    def models_read(self) -> None:
        """Note that this worker has read the models, and next waits for the others for the first time."""
        self.progress(FIRST_COLLECTIVE)

    def state_built(self) -> None:
        """Note that this worker has its training state, and prepares the rest."""
        self.progress(PREPARATIONS)

    def begin_update(self, update: int, micro_steps: int) -> None:
        """Note that this worker begins the update of this number, from 1, which has so many micro-steps of it."""
        self._update, self._left = update, micro_steps
        if self._limit_s == self.timeout_s:  # before, the first batch may take long, as nodes start that load data
            self.progress(UPDATE)

    def micro_step_done(self) -> None:
        """Note that a micro-step of the update is done."""
        self._left -= 1
        self.progress(UPDATE)

    def started(self) -> None:
        """Note that an update was seen to be done by all workers: a GPU may be asked for it long before."""
        if self._limit_s != self.timeout_s:
            self._limit_s = self.timeout_s
            self.progress(UPDATE)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Say so in this worker's signs of life while the `with` block runs."""
        self._waits_for_data = True
        try:
            yield
        finally:
            self._waits_for_data = False
        self.progress(UPDATE)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch this thread, in another, while the `with` block runs; it first reads the models."""
        self.progress(READING, timed=False)  # as long as the store takes
        self._thread = threading.get_ident()
        self._looked, interval_s = time.monotonic(), min(self.timeout_s / LOOKS, MOST_LOOK_S)
        exchanging = self.signs.exchanging(self._position, interval_s) if self.signs else nullcontext()
        with exchanging, repeating(self._look, interval_s, "watchdog"):
            yield

    @contextmanager
    def watched_last(self) -> Iterator[None]:
        """Watch no longer once the `with` block has ended: what follows may take as long as it does."""
        try:
            yield
        finally:
            self._is_over = True

    def _position(self) -> Position:
        """Return where this worker is in the run."""
        doing = "the wait for data" if self._waits_for_data else self.clock.phase or "the start"
        return Position(self._update, doing, self._left, whereabouts(self._thread))

    def _look(self) -> None:
        now, clock = time.monotonic(), self.clock
        if now - self._looked > self.timeout_s / 2:  # this whole process was stopped
            self._resumed = now
        self._looked = now
        if now - max(clock.since, self._resumed) > clock.limit_s and not self._is_over:
            self._end(clock)

    def _end(self, clock: Clock) -> None:
        suspect = self.signs.suspect(self._position(), self.timeout_s / 2) if self.signs else None
        longer = "" if clock.limit_s == self.timeout_s else "; longer until the first update is done"
        message = (
            f"{self.who} hung: nothing came of {clock.phase} for {duration(clock.limit_s)} (--hang_timeout_s="
            f"{self.timeout_s:g}{longer}): {suspect or UNKNOWN}; the stacks of its threads are in the log"
        )
        logger.error("%s", message)
        with self.log.open("a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        record_hang(self.folder.path, message)
        sending = threading.Thread(target=self._send, daemon=True)
        sending.start()
        sending.join(SENDING_S)
        if clock.phase == UPDATE:  # else it may be the writing that hangs
            writes_finished(self.timeout_s)
        os._exit(1)

    def _send(self) -> None:
        with suppress(Exception):  # the process ends in any case
            self.folder.push(HANG_FILE, self.log.name, tries=1)


@contextmanager
def worker_watched(job: Job, rank: int) -> Iterator[Watchdog]:
    """Give the watchdog of a run's worker, which watches this thread while the `with` block runs."""
    log = job.output_dir / log_of(job, f"worker {rank}")
    signs = SignsOfLife.of_process_group()
    watchdog = Watchdog(f"Worker {rank}", job.folder, log, job.config.hang_timeout_s, signs)
    # In the caller's process there is nobody to start it again.
    with nullcontext() if job.local else watchdog.watching():
        yield watchdog
