"""Work in threads whose results come in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
S = TypeVar("S")


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield `items`, one ahead of the consumer, in a thread that starts at once."""
    end = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="read_ahead")
    pending = pool.submit(next, items, end)

    def consume() -> Iterator[T]:
        nonlocal pending
        try:
            while (item := pending.result()) is not end:
                pending = pool.submit(next, items, end)
                yield item  # type: ignore[misc]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return consume()


def in_threads(work: Callable[[S], T], items: Iterable[S], threads: int, ahead: int) -> Iterator[T]:
    """Yield `work(item)` for each item, in order, from so many threads; at most `ahead` are begun before their turn.

    An error is raised in the place of its result.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="loading")
    pending: deque[Future[T]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
