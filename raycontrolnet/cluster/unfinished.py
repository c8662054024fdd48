"""Work that rank 0 is to finish before Ray Train ends its process, as when another worker has failed.

The names of Ray here are private; each stands in tests/test_ray_hooks.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

logger = logging.getLogger(__name__)

LOOK_S = 2.0
"""Time for which rank 0 waits at a time, in its process's main thread, which answers Ray's controller as well."""
ANSWER_S = 10.0
"""Time after which a process that should answer is not running."""


class FinishesFirst(WorkerGroupCallback):
    """A callback of Ray's controller that lets rank 0 finish before the group of workers is ended.

    Without it Ray ends all workers within seconds once it hears that one has failed, however that one ended. The
    public `ray.train.UserCallback` hears of failures alone, and cannot ask a worker. It is not called when the run is
    aborted, as by a second Ctrl-C.
    """

    def __init__(self, finished: Callable[[float], bool], limit_s: float):
        """Note what to wait for.

        Args:
            finished: called in rank 0's process: waits for so many seconds at most, and returns True if nothing is
                unfinished.
            limit_s: to wait in all.
        """
        self.finished, self.limit_s = finished, limit_s

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Return once rank 0 has finished, is gone or does not answer, or the limit is reached."""
        end = time.monotonic() + self.limit_s
        try:
            while not ray.get(worker_group.execute_single_async(0, self.finished, LOOK_S), timeout=LOOK_S + ANSWER_S):
                if time.monotonic() > end:
                    logger.warning("Rank 0 is ended although it has not finished within %g s", self.limit_s)
                    return
        except ray.exceptions.RayError:
            logger.info("Rank 0 cannot be asked whether it has finished", exc_info=True)
