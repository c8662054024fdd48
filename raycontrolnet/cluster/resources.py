"""What each worker gets of the machines: by the settings, and the nodes that are there or may come."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raycontrolnet.cluster.blocks import LOADING_CPUS
from raycontrolnet.cluster.nodes import _nodes, autoscaler_node_types, has_type
from raycontrolnet.config.settings import ClusterConfig
from raycontrolnet.errors import ConfigError

MIN_CPU_SHARE = 0.25


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
        """CPU threads of a worker."""
        return threads_of(self.cpus_per_worker)


def threads_of(cpus: float) -> int:
    """Of a process on `cpus` CPUs: rounded up, for loading takes the remainder of a CPU only at times."""
    return max(1, math.ceil(cpus))


def worker_resources(cluster: ClusterConfig) -> WorkerResources:
    """What each worker gets, by the settings and the connected cluster.

    Raises:
        ConfigError: as `share_out`.
    """
    import ray

    given = share_out(cluster, _nodes(), autoscaler_node_types())
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
    if not has_type(node, accelerator_type):
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
