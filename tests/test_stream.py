"""The stream of batches: packing, and with Ray Data the order, the start and the memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from processes import start_ray

from raycontrolnet.cluster.blocks import to_block
from raycontrolnet.data.records import PreparedRow
from raycontrolnet.data.stream import (
    MIN_READ_AHEAD_BYTES,
    StreamLayout,
    execution_options,
    local_batches,
    ray_batches,
    ray_dataset,
)
from raycontrolnet.errors import DataError

BATCH = 4
RESOLUTION = 128
BATCH_BYTES = BATCH * 2 * 3 * RESOLUTION**2


@dataclass(frozen=True)
class FakeLoader:
    """Stands in for BatchLoader: made-up rows, a mark for every batch that is loaded, and one bad sample."""

    marks: Path
    bad_sample: int = -1
    batch_size: int = BATCH

    def batch(self, first_sample: int) -> list[PreparedRow]:
        if first_sample <= self.bad_sample < first_sample + BATCH:
            raise DataError("photo.png is broken")
        (self.marks / str(first_sample)).touch()
        return [PreparedRow.fake(index, RESOLUTION) for index in range(first_sample, first_sample + BATCH)]


@pytest.fixture(scope="module")
def _local_ray() -> Iterator[None]:
    import ray

    ray.shutdown()  # that of other tests, which has more CPUs
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # tests are not installed where tasks run
    start_ray(num_cpus=1)
    yield
    ray.shutdown()


def shares(loader: FakeLoader, num_workers: int, first_sample: int, micro_steps: int, bundle: int = 3) -> list[Any]:
    """Return the workers' shares, as Ray Train splits them."""
    import ray

    layout = StreamLayout(first_sample, micro_steps, BATCH, num_workers, bundle)
    dataset = ray_dataset(ray.put(loader), layout, None)
    dataset.context.execution_options = execution_options(BATCH_BYTES, num_workers)
    return dataset.streaming_split(num_workers, equal=True)


def test_a_bundle_is_lossless_and_a_bad_batch_is_raised_in_its_turn() -> None:
    bundle = [[PreparedRow.fake(index, 24) for index in range(first, first + 3)] for first in (8, 20)]
    table = to_block([*bundle, DataError("photo.png is broken"), bundle[0]])
    assert table.num_rows == 1  # Ray Data cannot split it
    batches = ray_batches(SimpleNamespace(iter_batches=lambda **_: [table]))
    for batch in bundle:
        for row, back in zip(batch, next(batches), strict=True):
            assert (back.sample_index, back.prompt) == (row.sample_index, row.prompt)
            np.testing.assert_array_equal(back.image, row.image)
            np.testing.assert_array_equal(back.conditioning_image, row.conditioning_image)
    with pytest.raises(DataError, match=r"^photo\.png is broken$"):
        next(batches)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("bundle", [1, 2, 5, 100])
def test_bundles_hold_every_batch_once(num_workers: int, bundle: int) -> None:
    layout = StreamLayout(first_sample=20, micro_steps=7, batch_size=4, num_workers=num_workers, bundle=bundle)
    received: list[list[int]] = [[] for _ in range(num_workers)]
    for index, first_samples in enumerate(layout.bundles()):
        assert len(first_samples) <= bundle
        received[index % num_workers] += first_samples
    for rank, firsts in enumerate(received):
        assert firsts == [20 + (micro_step * num_workers + rank) * 4 for micro_step in range(7)]


def test_how_many_batches_travel_together() -> None:
    sizes = [BATCH * 2 * 3 * resolution**2 for resolution in (64, 256, 512, 1024)]
    assert [StreamLayout.bundle_for(size) for size in sizes] == [8, 8, 2, 1]
    assert StreamLayout.bundle_for(10**9) == 1


def test_local_batches_count_on_from_any_sample(tmp_path: Path) -> None:
    batches = list(local_batches(FakeLoader(tmp_path), first_sample=12, num_batches=3))  # type: ignore[arg-type]
    assert [row.sample_index for rows in batches for row in rows] == list(range(12, 24))


@pytest.mark.usefixtures("_local_ray")
@pytest.mark.parametrize(("num_workers", "first_sample", "bundle"), [(1, 0, 1), (1, 8, 5), (2, 20, 4)])
def test_every_worker_gets_its_samples_in_order(
    tmp_path: Path, num_workers: int, first_sample: int, bundle: int
) -> None:
    """Rank r at micro-step m gets the samples from first + (m * W + r) * B on, and whole batches."""
    import ray

    @ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
    def worker(share: Any, rank: int) -> list[list[int]]:
        received = []
        for rows in ray_batches(share):
            if rank == 0:
                time.sleep(0.02)  # workers of different speed
            received.append([row.sample_index for row in rows])
            np.testing.assert_array_equal(rows[-1].image, PreparedRow.fake(rows[-1].sample_index, RESOLUTION).image)
        return received

    split = shares(FakeLoader(tmp_path), num_workers, first_sample, 12 // num_workers, bundle)
    results = ray.get([worker.remote(share, rank) for rank, share in enumerate(split)])
    for rank, received in enumerate(results):
        firsts = [first_sample + (step * num_workers + rank) * BATCH for step in range(12 // num_workers)]
        assert received == [list(range(first, first + BATCH)) for first in firsts]


@pytest.mark.usefixtures("_local_ray")
def test_start_and_memory_do_not_grow_with_the_run(tmp_path: Path) -> None:
    """Ten million batches ahead: the first comes at once, and only a bounded number waits for a slow worker."""
    start = time.monotonic()
    (share,) = shares(FakeLoader(tmp_path), 1, 0, 10_000_000)
    batches = ray_batches(share)
    assert next(batches)[0].sample_index == 0
    assert time.monotonic() - start < 40
    time.sleep(4)
    loaded = len(list(tmp_path.iterdir()))
    coordinator = next(
        process for process in psutil.Process().children(recursive=True) if process.name().startswith("ray::SplitCoord")
    )
    before = sum(coordinator.cpu_times()[:2])
    time.sleep(4)
    assert sum(coordinator.cpu_times()[:2]) - before < 4 * 0.3, "Ray Data's loop turns without pause"
    assert loaded == len(list(tmp_path.iterdir())), "loading goes on without bounds"
    assert 2 <= loaded <= MIN_READ_AHEAD_BYTES / BATCH_BYTES
    assert [next(batches)[0].sample_index for _ in range(3)] == [4, 8, 12]


@pytest.mark.usefixtures("_local_ray")
def test_a_bad_sample_is_raised_as_the_users_error(tmp_path: Path) -> None:
    (share,) = shares(FakeLoader(tmp_path, bad_sample=9), 1, 0, 4)
    with pytest.raises(DataError, match=r"^photo\.png is broken$"):
        list(ray_batches(share))
