"""EC2 nodes for Ray's autoscaler: spot instances first, on-demand instances where there are none.

`ray up` and the autoscaler on the head load `SpotFirst` by its name in cluster.yaml, so both need this package.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider  # without it there is no fallback
from ray.autoscaler.node_launch_exception import NodeLaunchException

logger = logging.getLogger(__name__)

MARKET = "InstanceMarketOptions"
"""EC2's field that asks for spot instances."""


class SpotFirst(AWSNodeProvider):
    """Ray's provider for AWS, which starts on-demand instances where EC2 refuses spot instances.

    Ray's own asks for the same spot instances again, every few seconds and without end. A second node type for
    on-demand instances does not help: the autoscaler turns to another type when an instance was given and Ray did not
    come up on it, but not when EC2 refuses the instance (its CloudResourceMonitor counts ALLOCATION_TIMEOUT alone).
    """

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> dict[str, Any]:
        """Start `count` instances, or fewer if EC2 has no more; every availability zone is tried for spot first.

        Raises:
            NodeLaunchException: if EC2 refuses on-demand instances, too.
        """
        try:
            return super().create_node(node_config, tags, count)
        except NodeLaunchException as refusal:
            if MARKET not in node_config:
                raise
            logger.warning(
                "EC2 has no spot instance of type %s (%s): starting %d on demand",
                node_config.get("InstanceType"),
                refusal.category,
                count,
            )
        on_demand = {name: value for name, value in node_config.items() if name != MARKET}
        return super().create_node(on_demand, tags, count)
