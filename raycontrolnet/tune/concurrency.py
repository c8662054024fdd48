"""Number of trials that run at a time, and the resources of each, so that no trial waits for another's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from raycontrolnet.cluster.cpus import LOADING_CPUS, MIN_CPU_SHARE, threads_for
from raycontrolnet.cluster.nodes import ClusterNodes, Node, has_type, total
from raycontrolnet.config.cluster_settings import ClusterConfig
from raycontrolnet.config.sweep_config import SweepSettings
from raycontrolnet.errors import ConfigError
from raycontrolnet.text import counted

DRIVER_MEMORY = 2.0**20
"""Bytes for a trial's process if its workers are others: it needs something, and a share of a CPU may cost a worker."""
MOST_CPUS_BESIDE_GPU = 2.0
"""CPUs of a worker with a GPU: one launches the GPU's work, one reads the next samples."""


@dataclass(frozen=True)
class TrialSlots:
    """Places for trials."""

    at_a_time: int
    num_workers: int
    """Workers of a trial; 1 is the trial's own process."""
    cpus_per_worker: float
    gpus_per_worker: float
    accelerator_type: str | None
    reason: str
    """The reason for `at_a_time`, in words."""

    @property
    def in_process(self) -> bool:
        return self.num_workers == 1

    @property
    def use_gpu(self) -> bool:
        return self.gpus_per_worker > 0

    @property
    def threads(self) -> int | None:
        """CPU threads of a worker; None leaves them as they are."""
        return None if self.use_gpu else threads_for(self.cpus_per_worker)

    def resources(self) -> dict[str, float]:
        """Return Ray's resources of the process that Tune starts for a trial."""
        if not self.in_process:
            return {"memory": DRIVER_MEMORY}
        resources = {"CPU": self.cpus_per_worker}
        if self.use_gpu:
            resources["GPU"] = self.gpus_per_worker
        if self.accelerator_type:
            resources[f"accelerator_type:{self.accelerator_type}"] = 0.001
        return resources


def trial_slots(
    cluster: ClusterConfig, sweep: SweepSettings, nodes: ClusterNodes, num_trials: int, *, own: bool = False
) -> TrialSlots:
    """Return the slots for `num_trials` trials on `nodes`.

    Args:
        own: True for a Ray of our own, which counts one CPU for loading beside those of the machine.

    Raises:
        ConfigError: no trial fits, or trials would be elastic.
    """
    if len(set(cluster.worker_range)) > 1:
        problem = "a sweep's trials need a fixed number: elastic ones would take each other's workers"
        raise ConfigError([f"--num_workers={cluster.num_workers}: {problem}; give a number"])
    workers, most, both = cluster.most_workers, sweep.max_concurrent_trials, (*nodes.nodes, *(nodes.may_come or ()))
    all_nodes = [node for node in both if has_type(node, cluster.accelerator_type)]
    use_gpu = cluster.use_gpu
    if use_gpu is None:
        use_gpu = total("GPU", all_nodes) > 0
    gpus = (sweep.gpus_per_trial if workers == 1 else 1.0) if use_gpu else 0.0
    wanted = min(num_trials, most or num_trials)
    cpus = cluster.cpus_per_worker or _cpus_per_worker(all_nodes, workers, gpus, wanted)
    room, reason = _room(all_nodes, workers, cpus, gpus)
    if own:
        cpus_here = counted(total("CPU", all_nodes) - LOADING_CPUS, "CPU")
        reason = reason if "GPU" in reason else f"this machine has {cpus_here}"
    each = _each(workers, cpus, gpus, cluster.accelerator_type)
    if room == 0 and nodes.may_come is not None:
        raise ConfigError([f"--num_workers={cluster.num_workers}: no trial has room in the cluster ({reason}, {each})"])
    at_a_time = min(wanted, room) if room else wanted
    if at_a_time < room:
        reason = (
            f"--max_concurrent_trials; there is room for {room}" if at_a_time == most else "there are no more trials"
        )
    elif not room:
        reason = "the autoscaler does not say what it can start"
    elif most and most > room:
        reason += f"; --max_concurrent_trials={most} do not fit"
    return TrialSlots(
        at_a_time, workers, cpus, gpus, cluster.accelerator_type, f"{at_a_time} at a time, {each}: {reason}"
    )


def _cpus_per_worker(nodes: Sequence[Node], workers: int, gpus: float, wanted: int) -> float:
    """Return a worker's share of a node's CPUs.

    Without GPUs it is one CPU: two trials of one thread do more than one of two. Few trials get more each.
    """
    if gpus:
        shares = [node.get("CPU", 0.0) / _fit(node["GPU"], gpus) for node in nodes if _fit(node.get("GPU", 0.0), gpus)]
        return _rounded(min([MOST_CPUS_BESIDE_GPU, *shares]))
    spare = total("CPU", nodes) - LOADING_CPUS
    largest = max((node.get("CPU", 0.0) for node in nodes), default=1.0)
    return _rounded(max(1.0, min(spare // max(1, wanted * workers), largest)) if spare >= 1 else spare)


def _rounded(cpus: float) -> float:
    return max(MIN_CPU_SHARE, math.floor(4 * cpus) / 4)


def _room(nodes: Sequence[Node], workers: int, cpus: float, gpus: float) -> tuple[int, str]:
    """Return the number of trials that fit beside Ray Data, and what limits it."""
    all_cpus = total("CPU", nodes)
    rooms = sum(int(node.get("CPU", 0.0) / cpus + 1e-9) for node in nodes)
    if workers == 1:
        by_cpu = min(rooms, int((all_cpus - (0 if gpus else LOADING_CPUS)) / cpus + 1e-9))
        kept = "" if gpus else f", of which {LOADING_CPUS:g} is left to Ray Data"
    else:
        by_cpu = min(rooms // workers, int(all_cpus / (workers * cpus + LOADING_CPUS) + 1e-9))
        kept = f", of which {LOADING_CPUS:g} per trial is left to Ray Data"
    by_gpu = sum(_fit(node.get("GPU", 0.0), gpus) for node in nodes) // workers if gpus else math.inf
    if by_gpu <= by_cpu:
        return int(by_gpu), f"the cluster has {counted(total('GPU', nodes), 'GPU')}"
    return max(0, by_cpu), f"the cluster has {all_cpus:g} CPUs{kept}"


def _fit(gpus_of_node: float, gpus: float) -> int:
    """Return the number of workers that share a node's GPUs; none has parts of two."""
    return int(gpus_of_node) * int(1 / gpus + 1e-9)


def _each(workers: int, cpus: float, gpus: float, accelerator_type: str | None) -> str:
    each = f"each {workers} workers of " if workers > 1 else "each "
    each += f"{counted(cpus, 'CPU')}"
    if gpus:
        each += f" and {gpus:g} GPU" + (f" of type {accelerator_type}" if accelerator_type else "")
    return each
