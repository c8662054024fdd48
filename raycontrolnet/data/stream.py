"""The stream of prepared batches: from sample indices, through Ray Data tasks, to the workers, in a fixed order.

One Ray Data row, and one block, holds one worker's batches for a few micro-steps (a bundle). Blocks are dealt to the
workers round robin, so that rank r of W at micro-step m gets samples [(m * W + r) * B, (m * W + r + 1) * B) after the
first. A lazy generator makes the blocks' indices as they are needed: start-up and memory do not grow with the run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raycontrolnet.data.bundles import StreamPlan, pack, unpack
from raycontrolnet.data.latents import LatentCache
from raycontrolnet.data.order import Purpose, SampleOrder, keyed_rng
from raycontrolnet.data.records import PreparedRow
from raycontrolnet.data.sources import Source
from raycontrolnet.data.transforms import prepare_row
from raycontrolnet.errors import UserError

if TYPE_CHECKING:
    import ray

COUNT_CPUS = 0.01
"""CPUs of the task that counts sample indices. Unlike TASK_CPUS, which keeps Ray Data from fusing the two."""
TASK_CPUS = 0.25
"""CPUs that one loading task reserves: small, so that loading finds room beside workers that take nearly every CPU."""
LOADING_CPUS = 1
"""CPUs that workers must leave to loading. Ray's coordinator shares out whole CPUs only: with less, loading stalls."""
TICKET_BYTES = 256 * 1024
"""Size of the note that asks for one bundle. Ray Data holds back a task by the bytes of its waiting output, not by
their number: without ballast, the counting task would run millions of tiny notes ahead."""
LOADING_NICENESS = 15
REMOTE_READS = 16
"""Rows that one loading task reads at a time from a cache in an object store."""
READ_AHEAD_BATCHES = 8
"""Batches per worker that may wait in Ray's object store."""
READ_AHEAD_BUNDLES = 3
"""The same in bundles, if that is more."""
MIN_READ_AHEAD_BYTES = 64 * 2**20
"""Ray Data shares its limit among its operators by rough estimates: a small limit would stop it."""


@dataclass(frozen=True)
class PixelRows:
    """Rows that become samples by decoding and transforming their images."""

    source: Source
    resolution: int

    def sample(
        self, row: int, sample_index: int, *, proportion_empty_prompts: float, rng: np.random.Generator
    ) -> PreparedRow:
        """The source's row `row`, decoded and transformed.

        Raises:
            DataError: if it cannot be used; names it.
        """
        return prepare_row(
            self.source.read(row),
            sample_index,
            resolution=self.resolution,
            proportion_empty_prompts=proportion_empty_prompts,
            rng=rng,
        )


@dataclass(frozen=True)
class BatchLoader:
    """Makes the batch that begins at a sample index. Pickled to the loading tasks, so it holds no open files."""

    rows: PixelRows | LatentCache
    order: SampleOrder
    batch_size: int
    proportion_empty_prompts: float

    def sample(self, sample_index: int) -> PreparedRow:
        """The k-th sample: its row, from pixels or from the cache.

        Raises:
            DataError: if the row cannot be used; names it.
        """
        return self.rows.sample(
            self.order.row(sample_index),
            sample_index,
            proportion_empty_prompts=self.proportion_empty_prompts,
            rng=keyed_rng(self.order.seed, Purpose.PROMPT, sample_index),
        )

    def held_out_sample(self, index: int) -> PreparedRow:
        """The held-out sample `index`; its caption is always the same, and never the empty prompt by chance.

        Raises:
            DataError: if the row cannot be used; names it.
        """
        return self.rows.sample(
            int(self.order.held_out[index]),
            index,
            proportion_empty_prompts=0.0,
            rng=keyed_rng(self.order.seed, Purpose.HELD_OUT_PROMPT, index),
        )

    def batch(self, first_sample: int) -> list[PreparedRow]:
        """Samples [first_sample, first_sample + batch_size)."""
        indices = range(first_sample, first_sample + self.batch_size)
        if isinstance(self.rows, LatentCache) and not self.rows.folder.is_local:
            with ThreadPoolExecutor(REMOTE_READS) as pool:  # an object store answers late, but many at a time
                return list(pool.map(self.sample, indices))
        return [self.sample(index) for index in indices]


def local_batches(loader: BatchLoader, first_sample: int, num_batches: int) -> Iterator[list[PreparedRow]]:
    """The batches of a run without Ray, made in this process one by one."""
    for index in range(num_batches):
        yield loader.batch(first_sample + index * loader.batch_size)


def ray_dataset(loader_ref: ray.ObjectRef[BatchLoader], plan: StreamPlan, max_tasks: int | None) -> ray.data.Dataset:
    """The stream as a lazy Ray data set, a row for every bundle.

    Args:
        loader_ref: a `BatchLoader` in Ray's object store: rows of millions of paths travel once a node.
        max_tasks: loading tasks at a time; None leaves it to Ray Data.
    """
    import ray

    def count(_: pa.Table) -> Iterator[pa.Table]:
        ballast = pa.array([bytes(TICKET_BYTES)], pa.large_binary())
        for first_samples in plan.bundles():
            yield pa.table({"first_samples": [first_samples], "ballast": ballast})

    def load(tickets: pa.Table) -> Iterator[pa.Table]:
        let_training_go_first()
        loader = ray.get(loader_ref)
        for first_samples in tickets["first_samples"].to_pylist():
            yield pack([_batch_or_error(loader, first_sample) for first_sample in first_samples])

    dataset = (
        ray.data.from_blocks([pa.table({"stream": [0]})])  # unlike reads and from_arrow, this needs no CPU
        .map_batches(count, num_cpus=COUNT_CPUS, batch_format="pyarrow", batch_size=None)
        .map_batches(load, num_cpus=TASK_CPUS, batch_format="pyarrow", batch_size=None, concurrency=max_tasks)
    )
    one_row_a_block(dataset)
    return dataset


def _batch_or_error(loader: BatchLoader, first_sample: int) -> list[PreparedRow] | UserError:
    try:
        return loader.batch(first_sample)
    except UserError as error:
        # Raising it here would end the stream now, many batches before the workers come to this one.
        return error


def one_row_a_block(dataset: ray.data.Dataset) -> None:
    """Make every row of `dataset` a block of its own, quietly, and let Ray Data rest when it is idle."""
    dataset.context.target_max_block_size = 1  # bytes: a block is cut after every row
    dataset.context.enable_progress_bars = False
    dataset.context.custom_execution_callback_classes = [RestWhenIdle]


class RestWhenIdle:
    """A Ray Data execution callback: lets its scheduling loop sleep while there is nothing to schedule.

    While a task has made output that nobody has room for, and that is most of the time of a stream that is ahead of
    training, Ray 2.60's loop turns without pause: it took 60 to 70% of a CPU, and a fifth of the training's speed.
    """

    INTERVAL_S = 0.1

    def __init__(self) -> None:
        self._done: list[Any] | None = None

    def on_execution_step(self, executor: Any) -> None:
        """After every turn of the loop."""
        done = [
            (op.metrics.num_tasks_submitted, op.metrics.num_tasks_finished, op.metrics.num_task_outputs_generated)
            for op in executor._topology or ()
        ]
        if done == self._done:
            time.sleep(self.INTERVAL_S)
        self._done = done

    def before_execution_starts(self, executor: Any) -> None:
        pass

    def after_execution_succeeds(self, executor: Any) -> None:
        pass

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        pass


def let_training_go_first() -> None:
    """Give this loading process the lowest priority: it shares cores with workers whose threads wait for each other."""
    os.nice(max(0, LOADING_NICENESS - os.nice(0)))


def ray_batches(share: ray.data.DataIterator, prefetch_batches: int = 2) -> Iterator[list[PreparedRow]]:
    """This worker's batches from its share (`ray.train.get_dataset_shard`) of `ray_dataset`.

    Raises:
        DataError: when the worker comes to a batch that could not be made.
    """
    for table in share.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch_batches):
        yield from unpack(table)


def execution_options(batch_bytes: int, num_workers: int) -> ray.data.ExecutionOptions:
    """How Ray Data should run `ray_dataset`: in order, and only a few batches ahead of the workers."""
    from ray.data import ExecutionOptions, ExecutionResources

    # Enough to hide the loading behind the step, and flat memory however slow the step is.
    batches = max(READ_AHEAD_BATCHES, READ_AHEAD_BUNDLES * StreamPlan.bundle_for(batch_bytes))
    ahead = max(MIN_READ_AHEAD_BYTES, batches * batch_bytes * num_workers)
    limits = ExecutionResources(object_store_memory=ahead)
    return ExecutionOptions(preserve_order=True, resource_limits=limits)
