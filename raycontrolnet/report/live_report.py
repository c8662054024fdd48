"""Keeping report.html up to date while a run or a sweep goes on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raycontrolnet.report.run_report import write_report
from raycontrolnet.training.background import repeating

logger = logging.getLogger(__name__)

INTERVAL_S = 60.0
COST_FACTOR = 50.0
"""The pause after a report is this many times the CPU time that it took, but at most `LONGEST_PAUSE_S`."""
LONGEST_PAUSE_S = 120.0
LOW_PRIORITY = 10
"""Niceness of the thread that writes the report: at 19, two seconds of work take minutes on a busy machine."""


@contextmanager
def live_report(output_dir: Path, write: Callable[[Path], object] = write_report) -> Iterator[None]:
    """Write the report now and then, and at the end in any case. Errors are only logged: a report must not end a run.

    It is written without news too: its age shows that the run goes on.
    """
    next_at = 0.0

    def update() -> None:
        nonlocal next_at
        if time.monotonic() < next_at:
            return
        with suppress(OSError, AttributeError):  # only Linux has priorities of threads
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)
        started = time.thread_time()
        _write(output_dir, write)
        next_at = time.monotonic() + min(COST_FACTOR * (time.thread_time() - started), LONGEST_PAUSE_S)

    try:
        with repeating(update, INTERVAL_S, "report"):
            yield
    finally:
        _write(output_dir, write)


def _write(output_dir: Path, write: Callable[[Path], object]) -> None:
    try:
        write(output_dir)
    except Exception:
        logger.warning("report.html could not be written", exc_info=True)
