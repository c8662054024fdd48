"""Work in threads: results in order, errors in their place, and no more ahead than asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from raycontrolnet.data.threads import in_threads, read_ahead


def test_results_come_in_order_however_long_each_takes() -> None:
    def work(item: int) -> int:
        time.sleep(0.02 if item % 3 == 0 else 0)
        return item * item

    assert list(in_threads(work, range(20), threads=4, ahead=6)) == [item * item for item in range(20)]


def test_as_many_are_at_work_as_there_are_threads() -> None:
    meeting = threading.Barrier(3)
    assert list(in_threads(lambda _: meeting.wait(timeout=20) >= 0, range(6), threads=3, ahead=3)) == [True] * 6


def test_an_error_comes_in_its_place_and_ends_the_work() -> None:
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        return 1 // (item - 3)

    results = in_threads(work, range(1000), threads=4, ahead=5)
    assert [next(results) for _ in range(3)] == [-1, -1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert next(results, "over") == "over"
    assert len(begun) <= 3 + 1 + 5


def test_nothing_more_is_begun_for_a_consumer_that_stops() -> None:
    begun: list[int] = []
    results = in_threads(begun.append, range(1000), threads=2, ahead=4)
    next(results)
    results.close()  # type: ignore[attr-defined]
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("loading")]
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive()
    assert len(begun) <= 5


def test_reading_ahead_begins_at_once_and_is_one_ahead() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for item in range(10):
            made.append(item)
            yield item

    ahead = read_ahead(items())
    end = time.monotonic() + 20
    while not made and time.monotonic() < end:
        time.sleep(0.01)
    assert made == [0]
    assert next(ahead) == 0
    time.sleep(0.2)
    assert made == [0, 1]
