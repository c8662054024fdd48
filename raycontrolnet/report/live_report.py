"""Keeping report.html up to date while a run or a sweep goes on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raycontrolnet.report.background import repeating
from raycontrolnet.report.run_report import write_report
from raycontrolnet.training import metrics

logger = logging.getLogger(__name__)

INTERVAL_S = 60.0
COST_FACTOR = 50.0
"""The pause after a report is this many times the time that it took."""
LOWEST_PRIORITY = 19


@contextmanager
def live_report(
    output_dir: Path, write: Callable[[Path], object] = write_report, files: str = metrics.METRICS_FILE
) -> Iterator[None]:
    """Write the report now and then, and at the end in any case. Errors are only logged: a report must not end a run.

    Args:
        write: function that writes the report.
        files: pattern of the files in `output_dir` that change when there is something new to show.
    """
    seen, next_at = _state(output_dir, files), 0.0

    def update() -> None:
        nonlocal seen, next_at
        if time.monotonic() >= next_at and (state := _state(output_dir, files)) != seen:
            with suppress(OSError, AttributeError):  # only Linux has priorities of threads
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
            seen, started = state, time.monotonic()
            _write(output_dir, write)
            now = time.monotonic()
            next_at = now + COST_FACTOR * (now - started)

    try:
        with repeating(update, INTERVAL_S, "report"):
            yield
    finally:
        _write(output_dir, write)


def _state(output_dir: Path, files: str) -> float | None:
    """Return a number that changes when there is something new to show."""
    with suppress(OSError):
        return max((file.stat().st_mtime for file in output_dir.glob(files)), default=None)
    return None


def _write(output_dir: Path, write: Callable[[Path], object]) -> None:
    try:
        write(output_dir)
    except Exception:
        logger.warning("report.html could not be written", exc_info=True)
