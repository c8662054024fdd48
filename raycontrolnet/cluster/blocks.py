"""Objects on their way through Ray Data: one to a block, errors among them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raycontrolnet.cluster.cpus import COUNT_CPUS
from raycontrolnet.errors import root_cause

if TYPE_CHECKING:
    import ray

WHOLE_BLOCKS = {"batch_format": "pyarrow", "batch_size": None}
"""Arguments of `map_batches` and `iter_batches`: a batch is a block, as a pyarrow table."""


def to_block(item: object) -> pa.Table:
    """Return a table of one row that holds `item`, so that Ray Data moves it as one block."""
    return pa.table({"object": pa.array([pickle.dumps(item, protocol=5)], pa.large_binary())})


def from_block(table: pa.Table) -> Any:
    """Return the object that `to_block` put into `table`."""
    (cell,) = table["object"]
    return pickle.loads(cell.as_buffer())


def catch(work: Callable[[Any], object], item: object) -> object:
    """Return `work(item)`, or the error that it raises; an `item` that is an error already stays one.

    An error that Ray Data raised would hide its cause.
    """
    if isinstance(item, Exception):
        return item
    try:
        return work(item)
    except Exception as error:  # noqa: BLE001 (`results` raises it in the driver)
        return root_cause(error)


def generate(items: Callable[..., Iterator[object]], *args: object, num_cpus: float = COUNT_CPUS) -> ray.data.Dataset:
    """Return a lazy data set of the objects that one task makes by `items(*args)`: a row and a block for each.

    Data sets that are made from it keep one row to a block.

    Args:
        num_cpus: CPUs that the task reserves.
    """
    import ray

    from raycontrolnet.cluster.idle import RestWhenIdle

    def run(_: pa.Table) -> Iterator[pa.Table]:
        for item in items(*args):
            yield to_block(item)

    start = ray.data.from_items([0])  # unlike a read, this needs no CPU
    # A byte of memory: Ray Data would fuse the task with others that reserve the same.
    dataset = start.map_batches(run, num_cpus=num_cpus, memory=1, **WHOLE_BLOCKS)
    dataset.context.target_max_block_size = 1  # bytes: a block is cut after every row
    dataset.context.enable_progress_bars = False
    # Undocumented. Without it the scheduling loop takes most of a CPU from training.
    dataset.context.custom_execution_callback_classes = [RestWhenIdle]
    return dataset


def results(dataset: ray.data.Dataset) -> Iterator[Any]:
    """Run `dataset` and yield its objects in the order in which they are done.

    Raises:
        Exception: the first error that `catch` returned in the place of an object.
    """
    for table in dataset.iter_batches(prefetch_batches=0, **WHOLE_BLOCKS):
        item = from_block(table)
        if isinstance(item, Exception):
            raise item
        yield item
