"""Ray itself: start it or connect to it, stop its workers, and keep its noise in files."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from raycontrolnet.data.stream import LOADING_CPUS
from raycontrolnet.errors import ConfigError

LOCAL = "local"
STDERR = 2
ANSWER_TIMEOUT_S = 10.0
AUTH_TOKEN = Path("~/.ray/auth_token")
ABORT_TIMEOUT_S = 10.0
LOGGERS = (
    "ray", "ray.train", "ray.data", "ray.tune", "raycontrolnet", "diffusers", "transformers", "accelerate",
    "bitsandbytes", "huggingface_hub", "py.warnings",
)  # fmt: skip


def on_a_cluster(address: str | None) -> bool:
    """Whether `ray_session` will not start a Ray of our own, on this machine alone."""
    import ray

    return ray.is_initialized() or (address or os.environ.get("RAY_ADDRESS") or LOCAL) != LOCAL


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Ray for the time of a run: the one that is already connected, `address`, RAY_ADDRESS, or a new local one.

    What this function starts or connects to, it leaves again; what was there before stays.

    Raises:
        ConfigError: if there is no cluster at the address.
    """
    import ray
    from ray._private.utils import get_num_cpus  # knows about containers' limits

    set_up_environment()
    if ray.is_initialized():
        yield
        return
    target = address or os.environ.get("RAY_ADDRESS") or LOCAL
    # On a machine of our own, loading gets a CPU beside the real ones: it is idle most of the time, so that workers
    # need not give one up.
    of_our_own = {"num_cpus": get_num_cpus() + LOADING_CPUS, "include_dashboard": False} if target == LOCAL else {}
    try:
        if target != LOCAL:
            _check_somebody_answers(target)
            if AUTH_TOKEN.expanduser().is_file():  # `ray start` then asks for it
                os.environ.setdefault("RAY_AUTH_MODE", "token")
        ray.init(address=target, log_to_driver=False, **of_our_own)
    except (OSError, ValueError, RuntimeError) as error:
        origin = "--address" if address else "RAY_ADDRESS"
        problem = (
            f"{origin}={target}: no Ray cluster answers there ({' '.join(str(error).split())[:200]}). Start one with "
            "`ray start --head`, or leave the address out to train on this machine alone"
        )
        raise ConfigError([problem]) from error
    try:
        yield
    finally:
        ray.shutdown()


def set_up_environment() -> None:
    """What Ray is to do otherwise than by default, where nobody has said so in the environment."""
    from ray._private.utils import get_num_cpus

    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths in the data set mean the same in workers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's default of 15 lets everything else on the machine go first: with two threads waiting for each other, a
    # busy neighbour then slows training tenfold. Loading tasks lower their own priority.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray ends processes that were idle for a second: between two batches, and a new one takes seconds to import all.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
    # Ray warns of more than four times as many processes as it starts at once; a run on two CPUs has ten.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(max(4, get_num_cpus())))


def _check_somebody_answers(address: str) -> None:
    """Raise an OSError if nobody listens at HOST:PORT: Ray itself would try for minutes, printing."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_S).close()


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


@contextmanager
def shown_on(stream: TextIO | None) -> Iterator[TextIO]:
    """Where progress is shown: `stream`, or else standard error as it is now, for `logging_to` gives it to a file."""
    if stream not in (None, sys.stderr) or not _has_real_stderr():
        yield stream or sys.stderr
        return
    encoding, errors = sys.stderr.encoding, sys.stderr.errors
    with open(os.dup(STDERR), "w", buffering=1, encoding=encoding, errors=errors) as terminal:  # noqa: PTH123
        yield terminal


def _has_real_stderr() -> bool:
    """Not a notebook's or a test's."""
    try:
        return sys.stderr is sys.__stderr__ and sys.stderr.fileno() == STDERR  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """What is written to the process's standard error, also by Ray's C++ parts, goes to a file."""
    if not _has_real_stderr():
        yield
        return
    sys.stderr.flush()
    with path.open("ab") as file:
        kept = os.dup(STDERR)
        os.dup2(file.fileno(), STDERR)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, STDERR)
        os.close(kept)


@contextmanager
def logging_to(path: Path, *, of_ray: bool = True) -> Iterator[None]:
    """Send what Ray, the libraries and this package log, and Python's warnings, to a file instead of the terminal.

    Args:
        of_ray: False where Ray is not used, and need not be imported.
    """
    with _stderr_to(path):
        if of_ray:
            import ray.data
            import ray.train  # noqa: F401 (they set their loggers up when imported)
        with _loggers_to(path):
            yield


@contextmanager
def _loggers_to(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = {}
    logging.captureWarnings(True)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        before[name] = (logger.handlers[:], logger.propagate, logger.level)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO if name == "raycontrolnet" else logging.WARNING)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for name, (handlers, propagate, level) in before.items():
            logger = logging.getLogger(name)
            logger.handlers[:] = handlers
            logger.propagate = propagate
            logger.setLevel(level)
        handler.close()
