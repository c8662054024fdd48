"""Ray itself: start it or connect to it, keep its noise in files, and decide what each worker gets of the machines."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from raycontrolnet.data.stream import LOADING_CPUS
from raycontrolnet.errors import ConfigError
from raycontrolnet.settings import ClusterConfig

LOCAL = "local"
STDERR = 2
MIN_CPU_SHARE = 0.25
ANSWER_TIMEOUT_S = 10.0
AUTH_TOKEN = Path("~/.ray/auth_token")
BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml")
ABORT_TIMEOUT_S = 10.0
LOGGERS = (
    "ray", "ray.train", "ray.data", "ray.tune", "raycontrolnet", "diffusers", "transformers", "accelerate",
    "bitsandbytes", "huggingface_hub", "py.warnings",
)  # fmt: skip


@dataclass(frozen=True)
class WorkerResources:
    """What a run asks of the cluster."""

    num_workers: tuple[int, int]
    """(fewest, most)."""
    use_gpu: bool
    cpus_per_worker: float
    accelerator_type: str | None
    waits_for: str | None = None
    """What an autoscaling cluster does not have yet."""
    one_machine: bool = True
    """Whether all of the cluster is, and stays, a single machine."""
    spare: bool = False
    """Whether there is room, not taken by others, for one worker more than the run has, and for loading data still."""

    @property
    def threads(self) -> int:
        """CPU threads of a worker: its CPUs, rounded up (loading takes the remainder of a CPU only at times)."""
        return max(1, math.ceil(self.cpus_per_worker))


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


def _check_somebody_answers(address: str) -> None:
    """Raise an OSError if nobody listens at HOST:PORT: Ray itself would try for minutes, printing."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=ANSWER_TIMEOUT_S).close()


def worker_resources(cluster: ClusterConfig) -> WorkerResources:
    """What each worker gets, by the settings and the connected cluster.

    Raises:
        ConfigError: as `share_out`.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    given = share_out(cluster, nodes, autoscaler_node_types())
    free, workers = ray.available_resources(), given.num_workers[1] + 1
    there_is = free.get("CPU", 0.0) >= workers * given.cpus_per_worker + LOADING_CPUS
    there_is = there_is and (not given.use_gpu or free.get("GPU", 0.0) >= workers)
    return dataclasses.replace(given, spare=given.spare and there_is)


def share_out(
    cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]], node_types: Sequence[Mapping[str, float]] | None
) -> WorkerResources:
    """What each worker gets of `nodes`, or of those that an autoscaler may add.

    Args:
        nodes: Ray resources of every node that is up.
        node_types: Ray resources of every node type that an autoscaler can start; None if the cluster does not grow.

    Raises:
        ConfigError: if the cluster does not grow and the workers do not fit, or would leave no CPU for loading data:
            Ray would wait forever, without a word.
    """
    fewest, most = cluster.worker_range
    node_cpus = [node.get("CPU", 0.0) for node in nodes]
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    use_gpu = cluster.use_gpu
    if use_gpu is None:
        use_gpu = gpus > 0 or any(kind.get("GPU", 0) > 0 for kind in node_types or ())
    cpus = cluster.cpus_per_worker
    if cpus is None:
        share = _cpu_share(node_cpus, most)
        cpus = (min(1.0, share) if gpus else 1.0) if use_gpu else share
    room = sum(_room(node, cpus, use_gpu, cluster.accelerator_type) for node in nodes)
    problem = None
    if use_gpu and gpus == 0:
        problem = "--use_gpu=True: the cluster has no GPU; leave the flag out to train on the CPU"
    elif fewest * cpus + LOADING_CPUS > sum(node_cpus):
        problem = (
            f"--num_workers={cluster.num_workers}, --cpus_per_worker={cpus:g}: {fewest} x {cpus:g} of the "
            f"{sum(node_cpus):g} CPUs leave less than the {LOADING_CPUS:g} that loading data needs; lower either"
        )
    elif room < fewest:
        each = f"{cpus:g} CPUs" + (" and a GPU" if use_gpu else "")
        each += f" of type {cluster.accelerator_type}" if cluster.accelerator_type else ""
        problem = f"--num_workers={cluster.num_workers}: the cluster's nodes have room for {room} workers of {each}"
    if problem and node_types is None:
        raise ConfigError([problem])
    waits_for = f"the autoscaler: {problem}" if problem else None
    one_machine = len(nodes) == 1 and node_types is None
    # An elastic run takes a worker's place itself when there is one.
    spare = fewest == most and room > most and (most + 1) * cpus + LOADING_CPUS <= sum(node_cpus)
    return WorkerResources((fewest, most), use_gpu, cpus, cluster.accelerator_type, waits_for, one_machine, spare)


def _room(node: Mapping[str, float], cpus: float, use_gpu: bool, accelerator_type: str | None) -> int:
    """How many workers fit on a node."""
    if accelerator_type and not node.get(f"accelerator_type:{accelerator_type}"):
        return 0
    room = int(node.get("CPU", 0.0) / cpus)
    return min(room, int(node.get("GPU", 0.0))) if use_gpu else room


def _cpu_share(node_cpus: Sequence[float], num_workers: int) -> float:
    """The largest equal share, a multiple of 1/4 CPU, that fits `num_workers` times beside the loading of data."""
    spare = [max(0.0, cpus - LOADING_CPUS) for cpus in node_cpus]
    share = math.floor(4 * max(spare, default=1.0)) / 4
    while share > MIN_CPU_SHARE and sum(cpus // share for cpus in spare) < num_workers:
        share -= MIN_CPU_SHARE
    return max(share, MIN_CPU_SHARE)


class ClusterNodes(NamedTuple):
    """Ray's resources of the connected cluster, node by node."""

    nodes: list[dict[str, float]]
    """Those that are up."""
    may_come: list[dict[str, float]] | None
    """Those that an autoscaler can start; empty if it is not known which, None without one."""


def cluster_nodes() -> ClusterNodes:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    may_come = autoscaler_nodes()
    return ClusterNodes(nodes, None if may_come is None else _less(may_come, nodes))


def autoscaler_nodes() -> list[dict[str, float]] | None:
    """Resources of the nodes that an autoscaler of this cluster can start, as many as it may; see the types."""
    if not BOOTSTRAP_CONFIG.expanduser().is_file():
        return autoscaler_node_types()
    import yaml

    config = yaml.safe_load(BOOTSTRAP_CONFIG.expanduser().read_text())
    most = config.get("max_workers", 2)
    types = config.get("available_node_types", {}).values()
    nodes = [kind.get("resources", {}) for kind in types for _ in range(kind.get("max_workers", most))]
    return nodes[:most]


def _less(nodes: list[dict[str, float]], up: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """`nodes` without those that are up, as far as their CPUs and GPUs tell."""
    left = list(nodes)
    for node in up:
        alike = [one for one in left if all(one.get(name, 0) == node.get(name, 0) for name in ("CPU", "GPU"))]
        if alike:
            left.remove(alike[0])
    return left


def autoscaler_node_types() -> list[dict[str, float]] | None:
    """Resources of the node types that an autoscaler of this cluster can start; None if there is none.

    Ray has no call that tells. `ray up` leaves its configuration on the head, where drivers run; KubeRay names its
    cluster in the environment, but not its node types.
    """
    if BOOTSTRAP_CONFIG.expanduser().is_file():
        import yaml

        types = yaml.safe_load(BOOTSTRAP_CONFIG.expanduser().read_text()).get("available_node_types", {})
        return [kind.get("resources", {}) for kind in types.values() if kind.get("max_workers", 1) > 0]
    return [] if "RAY_CLUSTER_NAME" in os.environ else None


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
