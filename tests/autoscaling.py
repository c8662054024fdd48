"""The node that Ray's autoscaler starts for a demand: its own scheduler, on a cluster's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import (
    ResourceDemandScheduler,
    ResourceRequestSource,
    SchedulingNode,
    SchedulingNodeStatus,
)
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.instance_manager_pb2 import NodeKind


def node_type_for(
    demand: Mapping[str, float], config: dict[str, Any], availabilities: Mapping[str, float] | None = None
) -> str | None:
    """Return the type of node that the autoscaler starts for one task or actor; None if no type has room.

    Args:
        config: a cluster's settings after Ray's own preparations.
        availabilities: what the autoscaler remembers of node types that could not be had, 0 to 1.
    """
    kinds = AutoscalingConfig(config, skip_content_hash=True).get_node_type_configs()
    nodes = [
        SchedulingNode.from_node_config(kind, status=SchedulingNodeStatus.TO_LAUNCH, node_kind=NodeKind.WORKER)
        for kind in kinds.values()
        if kind.max_worker_nodes and kind.name != config["head_node_type"]
    ]
    best, _, _ = ResourceDemandScheduler._sched_best_node(
        [ResourceRequestUtil.make(dict(demand))],
        nodes,
        ResourceRequestSource.PENDING_DEMAND,
        {},
        dict(availabilities or {}),
    )
    return best.node_type if best else None
