"""The stream of batches: packing, and with Ray Data the order, the start and the memory."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from processes import start_ray
from reference import fake_row

from raycontrolnet.cluster.blocks import to_block
from raycontrolnet.data import stream
from raycontrolnet.data.order import SampleOrder
from raycontrolnet.data.records import EncodedRow, PreparedRow, StoredRow
from raycontrolnet.data.stream import (
    BatchLoader,
    StreamLayout,
    execution_options,
    local_batches,
    ray_batches,
    ray_dataset,
)
from raycontrolnet.data.transforms import encode_conditioning
from raycontrolnet.errors import DataError

# Ray ends its own thread, which waits for the rest of a stream that nobody reads to its end, by SystemExit.
pytestmark = pytest.mark.filterwarnings("ignore:Exception in thread iter_threaded")

BATCH = 4
RESOLUTION = 128
BATCH_BYTES = BATCH * 2 * 3 * RESOLUTION**2


@dataclass(frozen=True)
class FakeLoader:
    """Stands in for BatchLoader: made-up rows, a mark for every batch that is loaded, and one bad sample."""

    marks: Path
    bad_sample: int = -1
    batch_size: int = BATCH
    files: None = None
    rows: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(remote=False))

    def sample(self, sample_index: int) -> PreparedRow:
        if sample_index == self.bad_sample:
            raise DataError("photo.png is broken")
        (self.marks / str(sample_index)).touch()
        return fake_row(sample_index, RESOLUTION)

    def batch(self, first_sample: int) -> list[PreparedRow]:
        if first_sample <= self.bad_sample < first_sample + BATCH:
            raise DataError("photo.png is broken")
        (self.marks / str(first_sample)).touch()
        return [fake_row(index, RESOLUTION) for index in range(first_sample, first_sample + BATCH)]


@pytest.fixture(scope="module")
def _local_ray() -> Iterator[None]:
    import ray

    ray.shutdown()  # that of other tests, which has more CPUs
    for name in (__name__, fake_row.__module__):  # tests are not installed where tasks run
        ray.cloudpickle.register_pickle_by_value(sys.modules[name])
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
    bundle = [[fake_row(index, 24) for index in range(first, first + 3)] for first in (8, 20)]
    table = to_block([*bundle, DataError("photo.png is broken"), bundle[0]])
    assert table.num_rows == 1  # Ray Data cannot split it
    batches = ray_batches(SimpleNamespace(iter_batches=lambda **_: (each for each in [table])))
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
    assert [StreamLayout.bundle_for(size) for size in sizes] == [32, 10, 2, 1]
    assert StreamLayout.bundle_for(10**9) == 1


def test_the_first_bundles_are_small() -> None:
    layout = StreamLayout(first_sample=0, micro_steps=50, batch_size=4, num_workers=2, bundle=12)
    assert [len(bundle) for bundle in layout.bundles()][::2] == [1, 2, 4, 8, 12, 12, 11]


def test_local_batches_count_on_from_any_sample(tmp_path: Path) -> None:
    batches = list(local_batches(FakeLoader(tmp_path), first_sample=12, num_batches=3))  # type: ignore[arg-type]
    assert [[row.sample_index for row in rows] for rows in batches] == [
        [*range(12 + 4 * i, 16 + 4 * i)] for i in range(3)
    ]


def test_a_bad_sample_of_local_batches_is_raised_in_its_turn(tmp_path: Path) -> None:
    batches = local_batches(FakeLoader(tmp_path, bad_sample=9), first_sample=0, num_batches=1000)  # type: ignore[arg-type]
    assert [row.sample_index for _ in range(2) for row in next(batches)] == list(range(8))
    with pytest.raises(DataError, match=r"^photo\.png is broken$"):
        next(batches)
    assert len(list(tmp_path.iterdir())) < 20, "samples are loaded without bounds"


# --- from the latent cache ---


def cached(row: int, png: bytes | None = None) -> EncodedRow:
    rng = np.random.default_rng(row)
    control = np.zeros((RESOLUTION, RESOLUTION, 3), np.uint8)
    control[row] = 255
    posterior = rng.standard_normal((2, 4, RESOLUTION // 8, RESOLUTION // 8)).astype(np.float16)
    return EncodedRow(row, posterior, png or encode_conditioning(control), (f"number {row}",), "", (1, 2), "a.arrow")


def cached_batches(*rows: EncodedRow) -> list[list[StoredRow | PreparedRow]]:
    """Return batches of two of these rows, in this order, as they travel."""
    source = SimpleNamespace(remote=False, row_bytes=1, read=lambda row, view: rows[row])
    order = SampleOrder(len(rows), seed=0)
    order.row = lambda sample_index: sample_index  # type: ignore[method-assign]
    loader = BatchLoader(source, order, 2, 0.0)
    return [loader.batch(first) for first in range(0, len(rows), 2)]


def received(*bundles: list[list[StoredRow | PreparedRow]]) -> Iterator[list[PreparedRow]]:
    share = SimpleNamespace(iter_batches=lambda **_: (to_block(bundle) for bundle in bundles))
    return ray_batches(share)


def test_cached_samples_travel_as_they_are_stored() -> None:
    rows = [cached(index) for index in range(4)]
    batches = cached_batches(*rows)
    stored = sum(row.posterior.nbytes + len(row.conditioning_png) for row in rows)
    assert to_block(batches).nbytes < stored + 500 * len(rows)
    found = [row for batch in received(batches) for row in batch]
    for index, (row, back) in enumerate(zip(rows, found, strict=True)):
        assert (back.sample_index, back.prompt, back.image) == (index, f"number {index}", None)
        np.testing.assert_array_equal(back.posterior, row.posterior)
        assert back.conditioning_image.shape == (RESOLUTION, RESOLUTION, 3)
        assert (back.conditioning_image.any((1, 2)).nonzero()[0] == [index]).all()


def test_a_control_image_that_cannot_be_decoded_is_raised_in_its_turn() -> None:
    batches = received(cached_batches(cached(0), cached(1), cached(2), cached(3, b"no image")))
    assert [row.sample_index for row in next(batches)] == [0, 1]
    with pytest.raises(
        DataError, match=r"^a\.arrow: this part of the latent cache is damaged \(a control image: .*prepare"
    ):
        next(batches)


# --- with Ray Data ---


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
            np.testing.assert_array_equal(rows[-1].image, fake_row(rows[-1].sample_index, RESOLUTION).image)
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
    assert 2 <= loaded <= execution_options(BATCH_BYTES, 1).resource_limits.object_store_memory / BATCH_BYTES
    assert [next(batches)[0].sample_index for _ in range(3)] == [4, 8, 12]


@pytest.mark.usefixtures("_local_ray")
def test_eight_workers_never_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data deals a round of blocks when there is one for every worker: what they hold must leave room for it."""
    monkeypatch.setattr(stream, "MOST_IN_BUNDLE", 8)
    counts = [0] * 8
    micro_steps = 1 + 2 + 4 + 5 * 8

    def count(rank: int, share: Any) -> None:
        for _ in islice(ray_batches(share), micro_steps):
            counts[rank] += 1

    # The run is longer: at its end, when all tickets are made, Ray Data lets a task run in any case.
    split = shares(FakeLoader(tmp_path), 8, 0, 10**6, bundle=StreamLayout.bundle_for(BATCH_BYTES))
    threads = [threading.Thread(target=count, args=each, daemon=True) for each in enumerate(split)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 120
    for thread in threads:
        thread.join(timeout=max(0.0, end - time.monotonic()))
    assert counts == [micro_steps] * 8


@pytest.mark.usefixtures("_local_ray")
def test_a_bad_sample_is_raised_as_the_users_error(tmp_path: Path) -> None:
    (share,) = shares(FakeLoader(tmp_path, bad_sample=9), 1, 0, 4)
    with pytest.raises(DataError, match=r"^photo\.png is broken$"):
        list(ray_batches(share))
