"""A callback that lets Ray Data rest while it has nothing to schedule; private names of Ray Data live here.

Each stands in tests/test_ray_hooks.py, which fails when a new Ray has renamed it.
"""

from __future__ import annotations

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback


class RestWhenIdle(ExecutionCallback):
    """Sleeps after every turn of Ray Data's scheduling loop in which nothing has changed.

    Without it Ray 2.60's loop turns without pause while a task has made output that nobody has room for, as in most
    streams that are ahead of training: it took 60 to 70% of a CPU, and a fifth of the training's speed.
    """

    INTERVAL_S = 0.1

    def __init__(self) -> None:
        self._done: list[tuple[int, int, int]] | None = None

    def on_execution_step(self, executor: Any) -> None:
        """Sleep if no task has begun, ended or made output since the last turn."""
        # `_topology` is the only way to the operators. Without it the callback would not know when to sleep.
        done = [
            (op.metrics.num_tasks_submitted, op.metrics.num_tasks_finished, op.metrics.num_task_outputs_generated)
            for op in executor._topology
        ]
        if done == self._done:
            time.sleep(self.INTERVAL_S)
        self._done = done
