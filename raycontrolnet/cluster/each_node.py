"""A look at every node of the connected cluster, by a small task on each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from raycontrolnet.cluster import session
from raycontrolnet.cluster.nodes import Node
from raycontrolnet.text import error_message

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 60.0
"""Time to start a process on a node and to look."""


def has_cpus(node: Node) -> bool:
    """Check whether a node takes tasks that load data."""
    return node.get("CPU", 0.0) > 0


def on_each_node(
    look: Callable[..., Any], *args: object, of: Callable[[Node], bool] = has_cpus, here: bool = True
) -> list[tuple[str, Any]]:
    """Return (name of the node, `look(*args)` there) for the nodes that are up.

    Nodes that do not answer are left to the run itself. A Ray of our own is this machine: it has none to look at.

    Args:
        look: a function inside of another one, so that it travels whole: the nodes may not have this package.
        of: chooses nodes by their resources.
        here: whether to look at the driver's node, too.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if session.is_own():
        return []
    driver = None if here else ray.get_runtime_context().get_node_id()
    # A developer interface. Without it there is no way to all nodes.
    nodes = [node for node in ray.nodes() if node["Alive"] and of(node["Resources"]) and node["NodeID"] != driver]
    task = ray.remote(num_cpus=0, max_retries=0)(look)
    names = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        names[task.options(scheduling_strategy=there).remote(*args)] = node["NodeManagerHostname"]
    done, late = ray.wait(list(names), num_returns=len(names), timeout=ANSWER_TIMEOUT_S) if names else ([], [])
    for ref in late:
        logger.warning("the node %s has not answered within %g s", names[ref], ANSWER_TIMEOUT_S)
        ray.cancel(ref, force=True)
    answers = []
    for ref in done:
        try:
            answers.append((names[ref], ray.get(ref)))
        except ray.exceptions.RayError as error:  # the node is gone, or cannot start a process
            logger.warning("the node %s could not be looked at: %s", names[ref], error_message(error, 500))
    return answers
