"""The resources of a run's workers: from the settings, and the nodes that are up or may come."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from raycontrolnet.cluster.cpus import LOADING_CPUS, MIN_CPU_SHARE, threads_for
from raycontrolnet.cluster.nodes import Node, cluster_nodes, has_type, nodes_that_are_up, total
from raycontrolnet.config.checks import no_gpu
from raycontrolnet.config.cluster_settings import ClusterConfig
from raycontrolnet.errors import ConfigError
from raycontrolnet.text import counted


@dataclass(frozen=True)
class WorkerResources:
    """The resources that a run asks of the cluster."""

    num_workers: tuple[int, int]
    """(fewest, most)."""
    use_gpu: bool
    cpus_per_worker: float
    accelerator_type: str | None
    waits_for: str | None = None
    """Resources that an autoscaling cluster does not have yet, in words."""
    one_machine: bool = True
    """True if all of the cluster is, and stays, a single machine."""
    spare: bool = False
    """True if there is room that nobody uses for one worker more, and for loading data still."""

    @property
    def per_worker(self) -> dict[str, float]:
        """Ray's resources of a worker."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": 1} if self.use_gpu else {})

    @property
    def actor_options(self) -> dict[str, Any]:
        """Ray's options for an actor with the resources of a worker."""
        options: dict[str, Any] = {"num_cpus": self.cpus_per_worker}
        if self.use_gpu:
            options["num_gpus"] = 1
        if self.accelerator_type:
            options["accelerator_type"] = self.accelerator_type
        return options

    def fit_on(self, node: Node) -> bool:
        """Check whether a node has room for a worker when it is idle."""
        return _room(node, self.cpus_per_worker, self.use_gpu, self.accelerator_type) > 0

    @property
    def threads(self) -> int:
        """CPU threads of a worker."""
        return threads_for(self.cpus_per_worker)

    def say_what_is_awaited(self, stream: TextIO) -> None:
        """Say on `stream` which resources the cluster does not have yet, if any."""
        if self.waits_for:
            stream.write(f"waiting for {self.waits_for}\n")


def worker_resources(cluster: ClusterConfig) -> WorkerResources:
    """Return the workers' resources in the connected cluster.

    Raises:
        ConfigError: as `share_out`.
    """
    import ray

    given = share_out(cluster, *cluster_nodes(cluster))
    free, workers = ray.available_resources(), given.num_workers[1] + 1
    there_is = free.get("CPU", 0.0) >= workers * given.cpus_per_worker + LOADING_CPUS
    there_is = there_is and (not given.use_gpu or free.get("GPU", 0.0) >= workers)
    return dataclasses.replace(given, spare=given.spare and there_is)


def wanted_and_there(resources: WorkerResources) -> str:
    """Return what the connected cluster has free, and what the run needs, in words."""
    import ray

    up, free = nodes_that_are_up(), ray.available_resources()
    kinds = ("CPU", "GPU") if resources.use_gpu else ("CPU",)
    there = " and ".join(counted(free.get(kind, 0.0), kind) for kind in kinds)
    each = " and ".join(counted(amount, kind) for kind, amount in resources.per_worker.items())
    kind = f" of type {resources.accelerator_type}" if resources.accelerator_type else ""
    workers = counted(resources.num_workers[0], "worker")
    enough = all(free.get(kind, 0.0) >= resources.num_workers[0] * need for kind, need in resources.per_worker.items())
    starting = "; if a node has room for them, their processes are starting" if enough else ""
    return f"{counted(len(up), 'node')} up with {there} free; the run needs {workers} of {each}{kind}{starting}"


def no_cpu_for_loading() -> str | None:
    """Return in words that workers, of several runs, leave loading no CPU of the connected cluster; None if they do.

    Each run leaves one, which the workers of the next may take: both then wait for data, and neither ends.
    """
    import ray
    from ray.util import placement_group_table

    groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    held = [bundle["CPU"] for group in groups for bundle in group["bundles"].values() if bundle.get("CPU")]
    there = ray.cluster_resources().get("CPU", 0.0)
    if not held or there - sum(held) > LOADING_CPUS - 1e-6:  # sums of parts of CPUs are rounded
        return None
    share = math.floor((there - LOADING_CPUS) / len(held) / MIN_CPU_SHARE) * MIN_CPU_SHARE
    both = f", or start all with --cpus_per_worker {share:g}" if share else ""
    return (
        f"workers, of this run and others, hold {sum(held):g} of the cluster's {there:g} CPUs, and loading data needs "
        f"{LOADING_CPUS:g}; end another run{both}"
    )


def share_out(cluster: ClusterConfig, nodes: Sequence[Node], may_come: Sequence[Node] | None) -> WorkerResources:
    """Return the workers' shares of `nodes`, or of those that an autoscaler may add.

    Args:
        nodes: every node that is up.
        may_come: nodes that an autoscaler can start beside them; None if it is not known which.

    Raises:
        ConfigError: if the workers do not fit on what is and may come, or would leave no CPU for loading data: Ray
            would wait forever, without a word.
    """
    fewest, most = cluster.worker_range
    there_are_gpus = total("GPU", nodes) > 0
    use_gpu = cluster.use_gpu
    if use_gpu is None:
        use_gpu = there_are_gpus or total("GPU", may_come or ()) > 0
    cpus = cluster.cpus_per_worker
    if cpus is None:
        cpus = _cpus_per_worker(fewest, most, nodes, may_come, use_gpu=use_gpu)
        if use_gpu:
            cpus = min(1.0, cpus) if there_are_gpus else 1.0
    room = sum(_room(node, cpus, use_gpu, cluster.accelerator_type) for node in nodes)
    problem = _problem(cluster, nodes, cpus, room, use_gpu=use_gpu)
    if problem and may_come is not None:
        later = [*nodes, *may_come]
        room_later = sum(_room(node, cpus, use_gpu, cluster.accelerator_type) for node in later)
        grown = f", with the {counted(len(may_come), 'node')} that its autoscaler may add," if may_come else ""
        if never := _problem(cluster, later, cpus, room_later, use_gpu=use_gpu, grown=grown):
            raise ConfigError([never])
    # An elastic run takes a worker's place itself when there is one.
    spare = fewest == most and room > most and (most + 1) * cpus + LOADING_CPUS <= total("CPU", nodes)
    return WorkerResources(
        num_workers=(fewest, most),
        use_gpu=use_gpu,
        cpus_per_worker=cpus,
        accelerator_type=cluster.accelerator_type,
        waits_for=f"the autoscaler: {problem}" if problem else None,
        one_machine=len(nodes) == 1 and may_come == [],
        spare=spare,
    )


def _problem(
    cluster: ClusterConfig, nodes: Sequence[Node], cpus: float, room: int, *, use_gpu: bool, grown: str = ""
) -> str | None:
    """Return why the workers do not fit on `nodes` (`grown`: the words for those that are not up); None if they do."""
    fewest, all_cpus = cluster.worker_range[0], total("CPU", nodes)
    if use_gpu and not total("GPU", nodes):
        return no_gpu("the cluster has no GPU")
    if fewest * cpus + LOADING_CPUS > all_cpus:
        given = "" if cluster.cpus_per_worker is None else f", --cpus_per_worker={cpus:g}"
        most = max(0, int((all_cpus - LOADING_CPUS) / cpus))
        return (
            f"--num_workers={cluster.num_workers}{given}: {fewest} x {cpus:g} CPUs and {LOADING_CPUS:g} for loading "
            f"data are more than the {all_cpus:g} CPUs there are{grown.rstrip(',')}; {most} would fit"
        )
    if room < fewest:
        each = counted(cpus, "CPU") + (" and a GPU" if use_gpu else "")
        each += f" of type {cluster.accelerator_type}" if cluster.accelerator_type else ""
        there = f"the cluster{grown} has room for {counted(room, 'worker')} of {each}"
        return f"--num_workers={cluster.num_workers}: {there}; {_way_out(cluster, nodes, cpus, room)}"
    return None


def _way_out(cluster: ClusterConfig, nodes: Sequence[Node], cpus: float, room: int) -> str:
    """Return what to do where fewer workers fit on the nodes than are asked for."""
    if room:
        return f"{room} would fit"
    suited = [node for node in nodes if has_type(node, cluster.accelerator_type)]
    if not suited:
        return "no node has such GPUs: correct --accelerator_type, or leave it out"
    largest = max(node.get("CPU", 0.0) for node in suited)
    if largest < cpus:
        return f"no such node has more than {counted(largest, 'CPU')}: lower --cpus_per_worker"
    return f"no node with GPUs has {counted(cpus, 'CPU')}: lower --cpus_per_worker"


def _room(node: Node, cpus: float, use_gpu: bool, accelerator_type: str | None) -> int:
    """Return how many workers fit on a node."""
    if not has_type(node, accelerator_type):
        return 0
    room = int(node.get("CPU", 0.0) / cpus)
    return min(room, int(node.get("GPU", 0.0))) if use_gpu else room


def _cpus_per_worker(
    fewest: int, most: int, nodes: Sequence[Node], may_come: Sequence[Node] | None, *, use_gpu: bool
) -> float:
    """Return the share of a worker.

    On CPUs, the most workers are to fill what there may be, not what is up already: the cluster would never grow for
    them.
    """
    if not total("CPU", nodes):  # a head without CPUs says nothing of the workers' nodes
        return _cpu_share(may_come, most) if may_come else 1.0
    if use_gpu or fewest == most or may_come == []:
        return _cpu_share(nodes, most)
    now = _cpu_share(nodes, fewest)
    return min(now, _cpu_share([*nodes, *may_come], most)) if may_come else now


def _cpu_share(nodes: Sequence[Node], num_workers: int) -> float:
    """Return the largest equal share, a multiple of 1/4 CPU, that fits `num_workers` times beside loading data."""
    spare = [max(0.0, node.get("CPU", 0.0) - LOADING_CPUS) for node in nodes]
    share = math.floor(max(spare, default=1.0) / MIN_CPU_SHARE) * MIN_CPU_SHARE
    while share > MIN_CPU_SHARE and sum(cpus // share for cpus in spare) < num_workers:
        share -= MIN_CPU_SHARE
    return max(share, MIN_CPU_SHARE)
