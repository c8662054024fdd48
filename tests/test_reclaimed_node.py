"""A node that is reclaimed, as a spot instance: a checkpoint at Ray's notice, and the run goes on elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import last_step, when
from runs import Settings, column, run

from raycontrolnet.cluster.session import ray_session

pytestmark = pytest.mark.slow

UPDATES = 600
"""More than two workers do in the 15 seconds of the notice."""


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Start a head without CPUs, and two nodes with one each."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # that of other tests
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    with ray_session(cluster.address):
        yield cluster, nodes
    cluster.shutdown()


def test_a_reclaimed_node_costs_no_update(cluster: Any, tiny_settings: Settings, tmp_path: Path) -> None:
    """Two workers on two nodes; the machine of one gets its notice, and is gone 15 seconds later."""
    import ray

    ray_cluster, nodes = cluster
    settings = tiny_settings | {"num_workers": "1:2", "cpus_per_worker": 1.0, "train_batch_size": 2, "max_failures": 0}
    settings |= {"max_train_steps": UPDATES, "checkpointing_steps": 10_000}
    out = tmp_path / "out"

    def reclaim() -> None:
        gcs = ray._raylet.GcsClient(address=ray_cluster.address)
        deadline = int((time.time() + 15) * 1000)
        accepted, why = gcs.drain_node(nodes[0].node_id, 2, "spot", deadline)  # 2: PREEMPTION
        assert accepted, why
        time.sleep(15)
        ray_cluster.remove_node(nodes[0], allow_graceful=False)

    with when(lambda: last_step(out) >= 10, reclaim) as done:
        run(settings, out)
    assert done
    whole = run(settings, tmp_path / "whole", num_workers="0", gradient_accumulation_steps=2)
    begun = re.findall(r"update (\d+) on: (\d) worker", (out / "run.log").read_text())
    assert [workers for _, workers in begun] == ["2", "1"]
    assert 10 <= int(begun[1][0]) < UPDATES, "it went on from the checkpoint at the notice"
    assert column(out, "loss") == pytest.approx(column(whole, "loss"), rel=0, abs=1e-4)
