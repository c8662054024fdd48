"""The number of workers with which an elastic run starts again; private names of Ray Train live here.

Each stands in tests/test_ray_hooks.py, which fails when a new Ray has renamed it.
"""

from __future__ import annotations

from typing import Any

import ray
from ray._private import state as private_state
from ray.train.v2._internal.execution import scaling_policy as private


class ElasticPolicy(private.ElasticScalingPolicy):
    """Ray's policy, which counts no node that is gone or going, and takes no worker from a group that runs.

    Ray looks at the nodes every 20 s, and counts one that is about to be reclaimed: a run that has just lost a node
    would be started with too many workers, and wait a minute for them in vain.
    """

    def _count_possible_workers(self, reserved_resources: dict[str, dict[str, float]]) -> int:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        usable = alive - set(private_state.state.get_draining_nodes())
        on_usable = {node: resources for node, resources in reserved_resources.items() if node in usable}
        count: int = super()._count_possible_workers(on_usable)
        return count

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        """Return the decision to go on, or to start again with more workers.

        A group that a node is taken from writes a checkpoint first, and ends by itself.
        """
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, private.ResizeDecision) and decision.num_workers < worker_group_state.num_workers:
            return private.NoopDecision()
        return decision
