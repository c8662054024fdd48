"""The stream of prepared batches: from sample indices, through Ray Data tasks, to the workers, in a fixed order.

One Ray Data row, and one block, holds one worker's whole batch. Blocks of equal size are dealt to the workers round
robin, so that rank r of W at micro-step m gets samples [(m * W + r) * B, (m * W + r + 1) * B) after the first. A lazy
generator makes the blocks' indices as they are needed: start-up and memory do not grow with the run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from raycontrolnet.config import DataConfig
from raycontrolnet.data.order import Purpose, SampleOrder, keyed_rng
from raycontrolnet.data.records import PreparedRow
from raycontrolnet.data.sources import Source
from raycontrolnet.data.transforms import prepare_row
from raycontrolnet.errors import DataError, UserError

if TYPE_CHECKING:
    import ray

COUNT_CPUS = 0.01
"""CPUs of the task that counts sample indices. Unlike TASK_CPUS, which keeps Ray Data from fusing the two."""
TASK_CPUS = 0.25
"""CPUs that one loading task reserves: small, so that loading finds room beside workers that take nearly every CPU."""
LOADING_CPUS = 1
"""CPUs that workers must leave to loading. Ray's coordinator shares out whole CPUs only: with less, loading stalls."""
TICKET_BYTES = 256 * 1024
"""Size of the note that asks for one batch. Ray Data holds back a task by the bytes of its waiting output, not by their
number: without ballast, the counting task would run millions of tiny notes ahead."""
LOADING_NICENESS = 15
READ_AHEAD_BATCHES = 8
"""Batches per worker that may wait in Ray's object store."""
MIN_READ_AHEAD_BYTES = 64 * 2**20
"""Ray Data shares its limit among its operators by rough estimates: a small limit would stop it."""


@dataclass(frozen=True)
class BatchLoader:
    """Makes the batch that begins at a sample index. Pickled to the loading tasks, so it holds no open files."""

    source: Source
    order: SampleOrder
    batch_size: int
    resolution: int
    proportion_empty_prompts: float

    @staticmethod
    def build(source: Source, data: DataConfig, batch_size: int, seed: int) -> BatchLoader:
        order = SampleOrder(len(source), seed, data.max_train_samples)
        return BatchLoader(source, order, batch_size, data.resolution, data.proportion_empty_prompts)

    def sample(self, sample_index: int) -> PreparedRow:
        """The k-th sample: its row, decoded and transformed.

        Raises:
            DataError: if the row cannot be used; names it.
        """
        return prepare_row(
            self.source.read(self.order.row(sample_index)),
            sample_index,
            resolution=self.resolution,
            proportion_empty_prompts=self.proportion_empty_prompts,
            rng=keyed_rng(self.order.seed, Purpose.PROMPT, sample_index),
        )

    def batch(self, first_sample: int) -> list[PreparedRow]:
        """Samples [first_sample, first_sample + batch_size)."""
        return [self.sample(index) for index in range(first_sample, first_sample + self.batch_size)]


def pack(rows: list[PreparedRow]) -> pa.Table:
    """A batch as a table of one row, so that Ray Data moves it as one block and cannot split it."""
    return _table(
        first_sample=rows[0].sample_index,
        side=rows[0].image.shape[0],
        prompts=[row.prompt for row in rows],
        images=b"".join(row.image.tobytes() for row in rows),
        conditioning_images=b"".join(row.conditioning_image.tobytes() for row in rows),
    )


def pack_error(first_sample: int, error: UserError) -> pa.Table:
    """What travels in the place of a batch that could not be made."""
    return _table(first_sample=first_sample, error=str(error))


def unpack(table: pa.Table) -> list[PreparedRow]:
    """The inverse of `pack`; the images are views of the table's memory.

    Raises:
        DataError: if it is `pack_error`'s.
    """
    if error := table["error"][0].as_py():
        raise DataError(error)
    first, side = table["first_sample"][0].as_py(), table["side"][0].as_py()
    prompts = table["prompts"][0].as_py()
    shape = (len(prompts), side, side, 3)
    images, conditioning_images = (
        np.frombuffer(table[name][0].as_buffer(), np.uint8).reshape(shape) for name in ("images", "conditioning_images")
    )
    return [PreparedRow(first + i, images[i], conditioning_images[i], prompt) for i, prompt in enumerate(prompts)]


_SCHEMA = pa.schema(
    {
        "first_sample": pa.int64(),
        "side": pa.int64(),
        "prompts": pa.list_(pa.string()),
        "images": pa.large_binary(),
        "conditioning_images": pa.large_binary(),
        "error": pa.string(),
    }
)


def _table(**values: Any) -> pa.Table:
    return pa.table({name: [values.get(name)] for name in _SCHEMA.names}, schema=_SCHEMA)


def local_batches(loader: BatchLoader, first_sample: int, num_batches: int) -> Iterator[list[PreparedRow]]:
    """The batches of a run without Ray, made in this process one by one."""
    for index in range(num_batches):
        yield loader.batch(first_sample + index * loader.batch_size)


def ray_dataset(
    loader_ref: ray.ObjectRef[BatchLoader], batch_size: int, first_sample: int, num_batches: int, max_tasks: int | None
) -> ray.data.Dataset:
    """The batches from `first_sample` on as a lazy Ray data set of `num_batches` rows.

    Args:
        loader_ref: a `BatchLoader` in Ray's object store: rows of millions of paths travel once a node.
        max_tasks: loading tasks at a time; None leaves it to Ray Data.
    """
    import ray

    def count(_: pa.Table) -> Iterator[pa.Table]:
        ballast = pa.array([bytes(TICKET_BYTES)], pa.large_binary())
        for index in range(num_batches):
            yield pa.table({"first_sample": [first_sample + index * batch_size], "ballast": ballast})

    def load(tickets: pa.Table) -> Iterator[pa.Table]:
        _let_training_go_first()
        loader = ray.get(loader_ref)
        for first in tickets["first_sample"].to_pylist():
            try:
                yield pack(loader.batch(first))
            except UserError as error:
                # Raising here would end the stream now, many batches before the workers come to this one.
                yield pack_error(first, error)

    dataset = (
        ray.data.from_blocks([pa.table({"stream": [0]})])  # unlike reads and from_arrow, this needs no CPU
        .map_batches(count, num_cpus=COUNT_CPUS, batch_format="pyarrow", batch_size=None)
        .map_batches(load, num_cpus=TASK_CPUS, batch_format="pyarrow", batch_size=None, concurrency=max_tasks)
    )
    dataset.context.target_max_block_size = 1  # bytes: a block is cut after every row
    dataset.context.enable_progress_bars = False
    return dataset


def _let_training_go_first() -> None:
    """Give this loading process the lowest priority: it shares cores with the workers that wait for each other."""
    os.nice(max(0, LOADING_NICENESS - os.nice(0)))


def ray_batches(share: ray.data.DataIterator, prefetch_batches: int = 2) -> Iterator[list[PreparedRow]]:
    """This worker's batches from its share (`ray.train.get_dataset_shard`) of `ray_dataset`.

    Raises:
        DataError: when the worker comes to a batch that could not be made.
    """
    for table in share.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch_batches):
        yield unpack(table)


def execution_options(batch_bytes: int, num_workers: int) -> ray.data.ExecutionOptions:
    """How Ray Data should run `ray_dataset`: in order, and only a few batches ahead of the workers."""
    from ray.data import ExecutionOptions, ExecutionResources

    # Enough to hide the loading behind the step, and flat memory however slow the step is.
    ahead = max(MIN_READ_AHEAD_BYTES, READ_AHEAD_BATCHES * batch_bytes * num_workers)
    limits = ExecutionResources(object_store_memory=ahead)
    return ExecutionOptions(preserve_order=True, resource_limits=limits)
