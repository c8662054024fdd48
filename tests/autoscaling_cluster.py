"""A cluster with Ray's autoscaler, whose nodes are processes on this machine: Ray's fake multi-node provider.

`ray.cluster_utils.AutoscalingCluster` would stop every Ray on the machine.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
from documents import ROOT
from heads import free_ports, started_head
from ray.autoscaler._private.fake_multi_node import node_provider

IDLE_MINUTES = 0.5
"""After which a node goes: more than a process takes to start on a busy machine, as long as which it is idle."""

UNUSED = ("setup_commands", "head_setup_commands", "worker_setup_commands", "cluster_synced_files")
"""Lists that Ray asks for."""


class AutoscalingCluster(NamedTuple):
    address: str
    config: Path
    """The autoscaler's settings, which `ray up` leaves on a head as ~/ray_bootstrap_config.yaml."""

    def num_nodes(self) -> int:
        """Return the number of nodes beside the head; Ray must be connected."""
        return sum(node["Alive"] for node in ray.nodes()) - 1


@contextmanager
def autoscaling_cluster(folder: Path, node_types: Mapping[str, dict[str, Any]]) -> Iterator[AutoscalingCluster]:
    """Start a head without CPUs, whose autoscaler may start nodes of some types.

    Args:
        node_types: "resources" and "max_workers" by the type's name.
    """
    (port,), config = free_ports(1), folder / "ray_bootstrap_config.yaml"
    head_type = node_provider.FAKE_HEAD_NODE_TYPE
    settings = {
        "cluster_name": "test",
        "max_workers": sum(kind["max_workers"] for kind in node_types.values()),
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 100,
        "provider": {
            # `fake_multinode` would be its short name, but asks for a file that Ray's wheel lacks.
            "type": "external",
            "module": f"{node_provider.__name__}.{node_provider.FakeMultiNodeProvider.__name__}",
            "disable_node_updaters": True,
            "launch_multiple": True,
            "gcs_address": f"127.0.0.1:{port}",
            "head_node_id": node_provider.FAKE_HEAD_NODE_ID,
        },
        **{name: [] for name in UNUSED},
        "head_node_type": head_type,
        "available_node_types": {
            head_type: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **{name: {"node_config": {}, "min_workers": 0, **kind} for name, kind in node_types.items()},
        },
    }
    config.write_text(json.dumps(settings))  # which is YAML, too
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST"))}
    env = kept | {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": node_provider.FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_provider.FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_raylet_start_wait_time_s": "60",  # on a busy machine
    }
    flags = ["--num-cpus=0", "--include-dashboard=false", f"--autoscaling-config={config}"]
    with started_head(folder, env, *flags, port=port) as addresses:
        yield AutoscalingCluster(addresses.head, config)
