"""The nodes of the connected cluster, and those that an autoscaler may add."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from raycontrolnet.config.settings import ClusterConfig

BOOTSTRAP_CONFIG = Path("~/ray_bootstrap_config.yaml")
DEFAULT_MAX_WORKERS = 2
"""Ray's own."""
HEAD = "node:__internal_head__"
"""A resource that only the head has."""


def has_type(node: Mapping[str, float], accelerator_type: str | None) -> bool:
    """Whether a node has GPUs of the type that is asked for, if one is."""
    return not accelerator_type or bool(node.get(f"accelerator_type:{accelerator_type}"))


class ClusterNodes(NamedTuple):
    """Ray's resources of the connected cluster, node by node."""

    nodes: list[dict[str, float]]
    """Those that are up."""
    may_come: list[dict[str, float]] | None
    """Those that an autoscaler can start beside them; None if it is not known which."""


def cluster_nodes(cluster: ClusterConfig) -> ClusterNodes:
    """What is there, and of what may come the nodes that serve `cluster` best."""
    nodes = _nodes()
    return ClusterNodes(nodes, nodes_that_may_come(cluster, nodes))


def _nodes() -> list[dict[str, float]]:
    """Ray's resources of every node that is up."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


class _NodeType(NamedTuple):
    resources: dict[str, float]
    most: int
    """Nodes of this type."""

    def has(self, node: Mapping[str, float]) -> bool:
        """Whether `node` is of this type, as far as its CPUs and GPUs tell."""
        names = {"CPU", "GPU", *(name for name in self.resources if name.startswith("accelerator_type:"))}
        return all(node.get(name, 0) == self.resources.get(name, 0) for name in names)


class _Autoscaler(NamedTuple):
    types: list[_NodeType]
    """Empty if they are not known."""
    most: int
    """Nodes of all types together, beside the head."""


def autoscaler_node_types() -> list[dict[str, float]] | None:
    """Resources of the node types that an autoscaler of this cluster can start; None if there is none."""
    found = _autoscaler()
    return None if found is None else [kind.resources for kind in found.types if kind.most > 0]


def nodes_that_may_come(cluster: ClusterConfig, up: Sequence[Mapping[str, float]]) -> list[dict[str, float]] | None:
    """Resources of the nodes that an autoscaler of this cluster can start beside those that are `up`.

    As many as it may, of the types that serve `cluster` best: with its type of GPU, most GPUs, most CPUs.

    Returns:
        None if there is an autoscaler, but not known which nodes it starts.
    """
    found = _autoscaler()
    if found is None:
        return []
    if not found.types:
        return None
    left, workers = [kind.most for kind in found.types], [node for node in up if HEAD not in node]
    for node in workers:
        if (place := next((i for i, kind in enumerate(found.types) if kind.has(node)), None)) is not None:
            left[place] -= 1

    def worth(node: Mapping[str, float]) -> tuple[bool, float, float]:
        gpus = 0.0 if cluster.use_gpu is False else node.get("GPU", 0.0)
        return has_type(node, cluster.accelerator_type), gpus, node.get("CPU", 0.0)

    nodes = [kind.resources for kind, more in zip(found.types, left, strict=True) for _ in range(more)]
    return sorted(nodes, key=worth, reverse=True)[: max(0, found.most - len(workers))]


def _autoscaler() -> _Autoscaler | None:
    """What the autoscaler of this cluster may start; None if there is none.

    Ray has no call that tells. `ray up` leaves its configuration on the head, where drivers run; KubeRay names its
    cluster in the environment, but not its node types.
    """
    file = BOOTSTRAP_CONFIG.expanduser()
    if not file.is_file():
        return _Autoscaler([], 0) if "RAY_CLUSTER_NAME" in os.environ else None
    import yaml

    config: dict[str, Any] = yaml.safe_load(file.read_text())
    most = config.get("max_workers", DEFAULT_MAX_WORKERS)
    kinds = config.get("available_node_types", {}).values()
    return _Autoscaler([_NodeType(kind.get("resources", {}), kind.get("max_workers", most)) for kind in kinds], most)
