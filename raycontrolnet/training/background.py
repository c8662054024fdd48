"""Work that goes on in a thread beside a run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

from raycontrolnet.signals import haste

logger = logging.getLogger(__name__)


@contextmanager
def repeating(
    work: Callable[[], object], interval_s: float, name: str, *, patience_s: float | None = None
) -> Iterator[None]:
    """Call `work` every `interval_s` in a thread called `name`, which logs errors; at the end wait until it returns.

    Args:
        patience_s: to wait at the end, in haste less; None for as long as it takes.
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
        haste().wait(partial(_joined, thread), patience_s)


def _joined(thread: threading.Thread, seconds: float) -> bool:
    thread.join(seconds)
    return not thread.is_alive()


def begun(work: Callable[[], None], name: str, unfinished: set[Future[None]]) -> Future[None]:
    """Begin `work` in a thread called `name`, which the end of the process does not wait for.

    Args:
        unfinished: has the future that is returned until the work is done.
    """
    done: Future[None] = Future()

    def do() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (who waits gets it)
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=do, name=name, daemon=True).start()
    unfinished.add(done)
    done.add_done_callback(unfinished.discard)  # at once if it is done by now
    return done
