"""Objects on their way through Ray Data: one to a block, errors among them."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ray


import pickle
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from raycontrolnet.errors import root_cause

COUNT_CPUS = 0.01
"""CPUs of the task that counts sample indices. Unlike TASK_CPUS, which keeps Ray Data from fusing the two."""
TASK_CPUS = 0.25
"""CPUs that one loading task reserves: small, so that loading finds room beside workers that take nearly every CPU."""
LOADING_CPUS = 1
"""CPUs that workers must leave to loading. Ray's coordinator shares out whole CPUs only: with less, loading stalls."""
LOADING_NICENESS = 15


def to_block(item: object) -> pa.Table:
    """A table of one row, so that Ray Data moves the object as one block."""
    return pa.table({"object": pa.array([pickle.dumps(item, protocol=5)], pa.large_binary())})


def from_block(table: pa.Table) -> Any:
    """The inverse of `to_block`."""
    (cell,) = table["object"]
    return pickle.loads(cell.as_buffer())


def catch(work: Callable[[Any], object], item: object) -> object:
    """`work(item)`, or the error of this step or of one before: Ray Data's own would hide its cause."""
    if isinstance(item, Exception):
        return item
    try:
        return work(item)
    except Exception as error:  # noqa: BLE001 (the driver raises it)
        return root_cause(error)


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
