"""The nodes of the connected cluster, and those that an autoscaler may add."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from raycontrolnet.cluster import session
from raycontrolnet.config.cluster_settings import ClusterConfig

logger = logging.getLogger(__name__)

BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml")
"""Undocumented: where `ray up` leaves its settings on the head, on which drivers run. Ray has no call that tells what
its autoscaler may start. Without this file a run would refuse what has no room on the nodes that are up already."""
BOOTSTRAP_FLAG = "--autoscaling-config="
"""Undocumented: the flag by which Ray's autoscaler, also on the head, gets that file. Without it the same."""
KUBERAY_VARIABLE = "RAY_CLUSTER_NAME"
"""Undocumented: KubeRay's name of the cluster, in its pods. Without it the same, on Kubernetes."""
DEFAULT_MAX_WORKERS = 2
"""Ray's own, of that file."""
HEAD = "node:__internal_head__"
"""Undocumented: a resource that only the head has. Without it the head would count as one of the autoscaler's nodes."""

Node = Mapping[str, float]
"""Ray's resources of a node."""


def has_type(node: Node, accelerator_type: str | None) -> bool:
    """Check whether a node has GPUs of the wanted type; any node has if none is wanted."""
    return not accelerator_type or bool(node.get(f"accelerator_type:{accelerator_type}"))


def total(name: str, nodes: Iterable[Node]) -> float:
    """Return how much of a resource some nodes have together."""
    return sum(node.get(name, 0.0) for node in nodes)


class ClusterNodes(NamedTuple):
    """The nodes of the connected cluster."""

    nodes: list[dict[str, float]]
    """Nodes that are up."""
    may_come: list[dict[str, float]] | None
    """Nodes that an autoscaler can start beside them; None if it is not known which."""


def cluster_nodes(cluster: ClusterConfig) -> ClusterNodes:
    """Return the nodes that are up, and those that may come, best for `cluster` first."""
    nodes = nodes_that_are_up()
    return ClusterNodes(nodes, nodes_that_may_come(cluster, nodes))


def gpu_types(cluster: ClusterConfig) -> set[str | None]:
    """Return the types of GPUs that workers may get in the connected cluster, None among them for an unknown one."""
    if cluster.accelerator_type:
        return {cluster.accelerator_type}
    prefix, (up, may_come) = "accelerator_type:", cluster_nodes(cluster)
    found: set[str | None] = set() if may_come is not None else {None}
    for node in (*up, *(may_come or ())):
        if node.get("GPU"):
            found |= {name.removeprefix(prefix) for name in node if name.startswith(prefix)} or {None}
    return found


def nodes_that_are_up() -> list[dict[str, float]]:
    """Return the resources of every node that is up."""
    import ray

    # A developer interface. `ray.cluster_resources` gives sums alone, and ray.util.state needs a dashboard.
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def nodes_that_may_come(cluster: ClusterConfig, up: Sequence[Node]) -> list[dict[str, float]] | None:
    """Return the nodes that an autoscaler of this cluster can start beside those that are `up`.

    They are as many as it may start, the best for `cluster` first: with its type of GPU, most GPUs, most CPUs.

    Returns:
        None if there is an autoscaler, but it is not known which nodes it starts, or what they have.
    """
    found = _autoscaler()
    if found is None:
        return []
    if not all(kind.resources for kind in found.types) or not found.types:
        return None
    left, workers = [kind.most for kind in found.types], [node for node in up if HEAD not in node]
    for node in workers:
        if (place := next((i for i, kind in enumerate(found.types) if kind.matches(node)), None)) is not None:
            left[place] -= 1

    def worth(node: Node) -> tuple[bool, float, float]:
        gpus = 0.0 if cluster.use_gpu is False else node.get("GPU", 0.0)
        return has_type(node, cluster.accelerator_type), gpus, node.get("CPU", 0.0)

    nodes = [kind.resources for kind, more in zip(found.types, left, strict=True) for _ in range(more)]
    return sorted(nodes, key=worth, reverse=True)[: max(0, found.most - len(workers))]


class _NodeType(NamedTuple):
    resources: dict[str, float]
    most: int
    """Nodes of this type."""

    def matches(self, node: Node) -> bool:
        """Check whether `node` is of this type, as far as its CPUs and GPUs tell."""
        names = {"CPU", "GPU", *(name for name in self.resources if name.startswith("accelerator_type:"))}
        return all(node.get(name, 0) == self.resources.get(name, 0) for name in names)


class _Autoscaler(NamedTuple):
    types: list[_NodeType]
    """Empty if they are not known, as on KubeRay."""
    most: int
    """Nodes of all types together, beside the head."""


def _autoscaler() -> _Autoscaler | None:
    """Return what the autoscaler of this cluster may start; None if there is no autoscaler."""
    import yaml

    if session.is_own():  # whatever an earlier cluster has left on this machine
        return None
    file = BOOTSTRAP_CONFIG.expanduser()
    if not file.is_file():
        return _Autoscaler([], 0) if KUBERAY_VARIABLE in os.environ else None
    if not _runs_by(file):
        logger.warning("%s is of an autoscaler that does not run on this machine: no more nodes are expected", file)
        return None
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    most = config.get("max_workers", DEFAULT_MAX_WORKERS)
    kinds = config.get("available_node_types", {}).values()
    return _Autoscaler([_NodeType(kind.get("resources", {}), kind.get("max_workers", most)) for kind in kinds], most)


def _runs_by(file: Path) -> bool:
    """Check whether an autoscaler runs by `file` on this machine; an earlier cluster may have left it."""
    import psutil

    commands = (process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"]))
    return any(part == f"{BOOTSTRAP_FLAG}{file}" for command in commands for part in command)
