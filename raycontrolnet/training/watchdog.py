"""A watchdog that ends a worker which hangs, as in a collective with a lost worker, so that Ray starts it again."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.text import duration
from raycontrolnet.training.background import repeating
from raycontrolnet.training.failures import HANG_FILE, record_hang
from raycontrolnet.training.saver import writes_finished
from raycontrolnet.training.signs_of_life import Position, SignsOfLife
from raycontrolnet.training.whereabouts import whereabouts

logger = logging.getLogger(__name__)

SENDING_S = 20.0
"""Time to tell an object store of a hang."""
LOOKS = 20
"""Looks in the time that is allowed."""
UPDATE = "an update"
UNKNOWN = "by itself, or in waiting for another"
LEAST_COLLECTIVE_S = 1800
"""Ray Train's own limit to a collective."""
MOST_COLLECTIVE_S = 10**8


def collective_timeout_s(hang_timeout_s: float) -> int:
    """Return the seconds after which torch gives a collective up: later than a watchdog, which names its worker."""
    return int(min(max(LEAST_COLLECTIVE_S, 2 * hang_timeout_s), MOST_COLLECTIVE_S))


class Watchdog:
    """A clock that `progress` starts and puts back; when it has run for `timeout_s`, this process ends.

    Args:
        who: names the worker, for messages.
        log: gets the stacks of all threads.
        signs: of the run's workers; None if this is the only one.
    """

    def __init__(self, who: str, folder: RunFolder, log: Path, timeout_s: float, signs: SignsOfLife | None = None):
        self.who, self.folder, self.log, self.timeout_s, self.signs = who, folder, log, timeout_s, signs
        self.phase = ""
        self._waits_for_data = False
        self._update, self._left = 0, 0
        self._thread = threading.get_ident()
        self._since: float | None = None
        self._looked = 0.0

    def progress(self, phase: str, *, timed: bool = True) -> None:
        """Note that something was done, and what is being done now; if not `timed`, it may take as long as it does."""
        self.phase, self._since = phase, time.monotonic() if timed else None

    def begin_update(self, update: int, micro_steps: int) -> None:
        """Note that this worker begins the update of this number, from 1, which has so many micro-steps of it."""
        self._update, self._left = update, micro_steps
        if self.phase:  # after the first update, which may take long
            self.progress(UPDATE)

    def micro_step_done(self) -> None:
        """Note that a micro-step of the update is done."""
        self._left -= 1
        self.progress(UPDATE)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Say so in this worker's signs of life while the `with` block runs."""
        self._waits_for_data = True
        try:
            yield
        finally:
            self._waits_for_data = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch this thread, in another, while the `with` block runs."""
        self._thread = threading.get_ident()
        self._looked, interval_s = time.monotonic(), self.timeout_s / LOOKS
        exchanging = self.signs.exchanging(self._position, interval_s) if self.signs else nullcontext()
        with exchanging, repeating(self._look, interval_s, "watchdog"):
            yield

    def _position(self) -> Position:
        """Return where this worker is in the run."""
        doing = "the wait for data" if self._waits_for_data else self.phase or "the start"
        return Position(self._update, doing, self._left, whereabouts(self._thread))

    def _look(self) -> None:
        now = time.monotonic()
        if self._since is not None:
            if now - self._looked > self.timeout_s / 2:  # this whole process was stopped
                self._since = now
            if now - self._since > self.timeout_s:
                self._end()
        self._looked = now

    def _end(self) -> None:
        suspect = self.signs.suspect(self._position(), self.timeout_s / 2) if self.signs else None
        message = (
            f"{self.who} hung: nothing came of {self.phase} for {duration(self.timeout_s)} (--hang_timeout_s="
            f"{self.timeout_s:g}): {suspect or UNKNOWN}; the stacks of its threads are in the log"
        )
        logger.error("%s", message)
        with self.log.open("a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        record_hang(self.folder.path, message)
        sending = threading.Thread(target=self._send, daemon=True)
        sending.start()
        sending.join(SENDING_S)
        if self.phase == UPDATE:  # else it may be the writing that hangs
            writes_finished(self.timeout_s)
        os._exit(1)

    def _send(self) -> None:
        with suppress(Exception):  # the process ends in any case
            self.folder.push(HANG_FILE, self.log.name, tries=1)
