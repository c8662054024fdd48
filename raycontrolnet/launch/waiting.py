"""News of a run whose workers have not started yet, and a limit to the wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from raycontrolnet.cluster.resources import WorkerResources, wanted_and_there
from raycontrolnet.errors import RunError
from raycontrolnet.report.background import repeating
from raycontrolnet.text import duration
from raycontrolnet.training.job import WORKERS_FILE

FIRST_NEWS_S = 30.0
LOOK_INTERVAL_S = 1.0


@contextmanager
def waiting_for_workers(
    output_dir: Path, resources: WorkerResources, limit_s: float | None, abort: Callable[[], None], stream: TextIO
) -> Iterator[None]:
    """Say on `stream` what a run waits for, as long as no worker has started: after 30 s, 1, 2, 4 minutes and so on.

    Args:
        limit_s: seconds after which the run is ended.
        abort: ends the run, whose `with` block then raises.

    Raises:
        RunError: the limit was reached.
    """
    start, next_news, too_late = time.monotonic(), FIRST_NEWS_S, ""

    def look() -> None:
        nonlocal next_news, too_late
        waited = time.monotonic() - start
        if too_late or (output_dir / WORKERS_FILE).exists():
            return
        if limit_s is not None and waited >= limit_s:
            too_late = f"No worker has started within --wait_timeout_s={limit_s:g}: {wanted_and_there(resources)}"
            abort()
        elif waited >= next_news:
            next_news *= 2
            stream.write(f"waiting for workers, {duration(waited)}: {wanted_and_there(resources)}\n")

    try:
        with repeating(look, LOOK_INTERVAL_S, "waiting"):
            yield
    except Exception as error:
        if too_late:
            raise RunError(f"{too_late}. Lower --num_workers, or wait longer") from error
        raise
