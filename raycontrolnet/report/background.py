"""Work that goes on in a thread beside a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeating(work: Callable[[], object], interval_s: float, name: str) -> Iterator[None]:
    """Call `work` every `interval_s` in a thread called `name`; at the end wait until it has returned."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(interval_s):
            work()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
