"""Work that goes on in a thread beside a run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def repeating(
    work: Callable[[], object], interval_s: float, name: str, *, patience_s: float | None = None
) -> Iterator[None]:
    """Call `work` every `interval_s` in a thread called `name`, which logs errors; at the end wait until it returns.

    Args:
        patience_s: to wait at the end; None for as long as it takes.
    """
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(interval_s):
            try:
                work()
            except Exception:
                logger.warning("%s: it goes on", name, exc_info=True)

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(patience_s)
