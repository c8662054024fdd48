"""Ray's TorchTrainer, made interruptible; private names of Ray Train's driver live here.

Each stands in tests/test_ray_hooks.py, which fails when a new Ray has renamed it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any

import ray
from ray._private import state as ray_state
from ray._private.services import get_webui_url_from_internal_kv
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import (
    ENABLE_PREEMPTION_WATCHER_ENV_VAR,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
    WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR,
)
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.worker_group import worker_group
from ray.train.v2.api import data_parallel_trainer as private

from raycontrolnet.cluster.elastic import ElasticPolicy
from raycontrolnet.cluster.environment import passed_on
from raycontrolnet.cluster.unfinished import FinishesFirst
from raycontrolnet.cluster.worker import RECORDS_OF_RAY
from raycontrolnet.errors import RunError
from raycontrolnet.signals import haste
from raycontrolnet.storage.run_folder import RunFolder

logger = logging.getLogger(__name__)

ABORT_TIMEOUT_S = 10.0
ELASTIC_START_TIMEOUT_S = 15.0
"""Time after which an elastic run whose workers got no place counts the nodes again; Ray's 60 is for nodes to come, but
an elastic run starts on those that are up."""
CONTROLLER_ENVIRONMENT = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}
"""As Ray's own. Without it Ray warns of its own code in the controller's log."""


class InterruptibleTrainer(TorchTrainer):
    """A TorchTrainer that another thread can `abort`, and that stops its workers before Ctrl-C's KeyboardInterrupt."""

    worker_timeout_s: float | None = None
    """Seconds after which a worker that does not answer, as a stopped process, is lost; by default Ray's 600."""
    folder: RunFolder | None = None
    """The run's folder, from which Ray's records of a lost controller are removed."""
    one_machine: bool = False
    """True if no machine can be reclaimed while others go on: no process looks out for it, which costs 3 s of a CPU."""
    finished: Callable[[float], bool] | None = None
    """Function for rank 0's process, which is ended once that returns True, or `worker_timeout_s` is over."""
    controller: Any = None
    _is_aborted = False
    _groups_name: str = ""
    """Beginning of the names of the workers' placement groups."""

    def fit_or_abort(self, restarts: int = 0) -> ray.train.Result:
        """Train; on Ctrl-C, or what else ends the thread, stop the workers before it is raised.

        Args:
            restarts: number of times that a controller which was killed is started again; the workers then continue
                from their last checkpoint.
        """
        while True:
            try:
                return self.fit()
            except ray.exceptions.RayActorError:
                self._remove_placement_groups()
                if self._is_aborted or not restarts:
                    raise
                restarts -= 1
                logger.warning("Ray Train's controller was lost, and is started again", exc_info=True)
                if self.folder:
                    with suppress(OSError):  # a store that fails for a moment: Ray then says what it finds
                        self.folder.delete(*RECORDS_OF_RAY)
            except ray.train.WorkerGroupError as error:
                if any(isinstance(each, WorkerHealthCheckTimeoutError) for each in error.worker_failures.values()):
                    limit = f"--hang_timeout_s={self.worker_timeout_s:g}"
                    problem = f"A worker has not answered within {limit}: its process, or its machine, has stopped"
                    raise RunError(problem) from error
                raise
            except Exception:
                raise
            except BaseException:
                self.abort()
                raise
            finally:
                # Ray numbers actors anew after a restart in this process: a handle that is dropped later would end
                # another run's controller.
                self.controller = None

    def abort(self) -> None:
        """Stop the workers; `fit`, in another thread, then raises. Does nothing before the training has begun."""
        if (controller := self.controller) is not None:
            self._is_aborted = True
            try:
                with suppress(ray.exceptions.RayError):
                    ray.get(controller.abort.remote(), timeout=haste().left_s(ABORT_TIMEOUT_S))
            finally:  # also at a second Ctrl-C
                ray.kill(controller)
                with suppress(ray.exceptions.RayError):  # raised once it is dead, and makes no more groups
                    ray.get(controller.get_result.remote(), timeout=haste().left_s(ABORT_TIMEOUT_S))
                self._remove_placement_groups()

    def answers(self, within_s: float) -> bool:
        """Check whether Ray still has the controller while there is one: its processes may have been ended as well.

        Ray is asked, not the controller: that one may be waiting for rank 0, see `FinishesFirst`.
        """
        if (controller := self.controller) is None:
            return True
        asked: Future[bool] = Future()

        def ask() -> None:  # in a thread: a Ray that is gone may hold the call itself up
            try:
                asked.set_result(ray_state.actors(controller._actor_id.hex()).get("State") not in (None, "DEAD"))
            except Exception:
                logger.info("Ray does not say whether its controller lives", exc_info=True)

        threading.Thread(target=ask, name="ray answers", daemon=True).start()
        return not wait((asked,), within_s).not_done and asked.result()

    def _remove_placement_groups(self) -> None:
        """Remove the placement groups that the controller left, as when it was ended while workers were starting.

        Ray keeps them as long as the driver lives: the next run on it would wait for their CPUs, without a word.
        """
        for group in self._placement_groups():
            if group["state"] != "REMOVED":
                with suppress(ValueError):  # removed meanwhile
                    ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))

    def is_waiting(self) -> bool:
        """Check whether the workers have no place yet, at the start or after a loss."""
        return not any(group["state"] == "CREATED" for group in self._placement_groups())

    def _placement_groups(self) -> list[dict[str, Any]]:
        groups = ray.util.placement_group_table().values()
        return [group for group in groups if self._groups_name and group["name"].startswith(self._groups_name)]

    def _initialize_and_run_controller(self, **options: Any) -> ray.train.Result:
        """Run the training as Ray's own method does, but keep the controller and leave SIGINT alone.

        Ray's own tells its controller to nobody: without this override nothing could abort a run. It also handles
        SIGINT: Ctrl-C would end the process without a word, and wait without end while workers are starting.
        """
        if not has_dashboard():
            options["callbacks"] = [each for each in options["callbacks"] if not _waits_for_dashboard(each)]
        if self.finished:  # before Ray's own, which end the process group
            first = FinishesFirst(self.finished, self.worker_timeout_s or 0.0)
            options["callbacks"] = [first, *options["callbacks"]]
        # The workers have the controller's. With a Ray that the user has connected, nothing else passes ours on.
        environment = passed_on() | CONTROLLER_ENVIRONMENT | private.get_env_vars_to_propagate()
        if self.worker_timeout_s is not None:
            environment.setdefault(WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR, str(self.worker_timeout_s))
        if self.one_machine:
            environment.setdefault(ENABLE_PREEMPTION_WATCHER_ENV_VAR, "0")
        if self.scaling_config.elasticity_enabled:
            options["scaling_policy"] = ElasticPolicy(self.scaling_config)
            environment.setdefault(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, str(ELASTIC_START_TIMEOUT_S))
        self._groups_name = f"raycontrolnet-{uuid.uuid4().hex}-"
        self.controller = ray.remote(
            num_cpus=0,
            label_selector={"ray.io/node-id": ray.get_runtime_context().get_node_id()},  # the driver's
            runtime_env={"env_vars": environment},
        )(TrainController).remote(self._groups_name, **options)
        ray.get(self.controller.run.remote())
        return ray.get(self.controller.get_result.remote())


class TrainController(private.TrainController):
    """Ray's controller, with names for its placement groups: without them nobody could tell whose they are."""

    def __init__(self, groups_name: str, **options: Any):
        make, numbers = worker_group.placement_group, itertools.count()
        # Only in the controller's own process.
        worker_group.placement_group = lambda *args, **how: make(
            *args, **how | {"name": f"{groups_name}{next(numbers)}"}
        )
        super().__init__(**options)


def _waits_for_dashboard(callback: Any) -> bool:
    """Check for the callback that asks the dashboard whether the controller lives.

    Without a dashboard it never hears, and every run ends 12 s late. `_remove_placement_groups` does its work.
    """
    return isinstance(callback, private.PlacementGroupCleanerCallback)


def has_dashboard() -> bool:
    """Check whether the connected Ray has a dashboard.

    The public `ray.init().dashboard_url` names one in every worker process, as that of a sweep's trial, even if there
    is none.
    """
    return bool(get_webui_url_from_internal_kv())
