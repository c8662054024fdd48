"""Ray's TorchTrainer, made interruptible."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

ABORT_TIMEOUT_S = 10.0


def interruptible_trainer() -> Any:
    """Ray's TorchTrainer, but Ctrl-C raises KeyboardInterrupt once the workers are stopped.

    Ray's own handler ends the process without a word, and waits without end while workers are starting.
    """
    import ray
    from ray.train.torch import TorchTrainer

    class InterruptibleTrainer(TorchTrainer):
        controller: Any = None

        def _register_sigint_handler(self, controller: Any) -> None:
            self.controller = controller

        def _initialize_and_run_controller(self, **options: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                return super()._initialize_and_run_controller(**options)
            # Ray's own, which tells its controller to nobody in other threads, such as that of a sweep's trial.
            from ray.train.v2.api import data_parallel_trainer as own

            controller = ray.remote(
                num_cpus=0,
                label_selector={ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()},
                runtime_env={"env_vars": own.get_env_vars_to_propagate()},
            )(own.TrainController)
            self.controller = controller.remote(**options)
            ray.get(self.controller.run.remote())
            return ray.get(self.controller.get_result.remote())

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            if has_dashboard():
                return callbacks
            # It asks the dashboard whether the controller lives. Without one it never hears, and ends 12 s late, after
            # every run; a Ray without dashboard is our own, and takes its placement groups with it.
            return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"]

        def fit_or_abort(self) -> ray.train.Result:
            try:
                return self.fit()
            except KeyboardInterrupt:
                self.abort()
                raise

        def abort(self) -> None:
            """Stop the workers; `fit` then raises."""
            if self.controller is not None:
                with suppress(ray.exceptions.RayError):
                    ray.get(self.controller.abort.remote(), timeout=ABORT_TIMEOUT_S)
                ray.kill(self.controller)

    return InterruptibleTrainer


def has_dashboard() -> bool:
    """Whether the connected Ray has one, on which its State API rests."""
    from ray._private.worker import get_dashboard_url

    return bool(get_dashboard_url())
