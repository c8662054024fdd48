"""A watchdog that ends a worker which hangs, as in a collective with a lost worker, so that Ray starts it again."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raycontrolnet.text import duration
from raycontrolnet.training.failures import record_hang

logger = logging.getLogger(__name__)

LOOKS = 20
"""Looks in the time that is allowed."""


class Watchdog:
    """A clock that `progress` starts and puts back; when it has run for `timeout_s`, this process ends.

    Args:
        who: names the worker, for messages.
        log: gets the stacks of all threads.
    """

    def __init__(self, who: str, output_dir: Path, log: Path, timeout_s: float):
        self.who, self.output_dir, self.log, self.timeout_s = who, output_dir, log, timeout_s
        self.phase = ""
        self._since: float | None = None

    def progress(self, phase: str) -> None:
        """Note that something was done, and what is being done now."""
        self.phase, self._since = phase, time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch, in a thread, while the `with` block runs."""
        over = threading.Event()
        thread = threading.Thread(target=self._watch, args=(over,), daemon=True, name="watchdog")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _watch(self, over: threading.Event) -> None:
        interval, looked = self.timeout_s / LOOKS, time.monotonic()
        while not over.wait(interval):
            now = time.monotonic()
            if self._since is not None:
                if now - looked > self.timeout_s / 2:  # this whole process was stopped
                    self._since = now
                if now - self._since > self.timeout_s:
                    self._end()
            looked = now

    def _end(self) -> None:
        message = (
            f"{self.who} hung: nothing came of {self.phase} for {duration(self.timeout_s)} (--hang_timeout_s="
            f"{self.timeout_s:g}); the stacks of its threads are in the log"
        )
        logger.error("%s", message)
        with self.log.open("a", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        record_hang(self.output_dir, message)
        os._exit(1)
