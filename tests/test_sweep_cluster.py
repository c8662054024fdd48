"""A sweep on a cluster of several nodes, of which one is lost."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import when

from raycontrolnet import SweepConfig, TrainConfig, sweep
from raycontrolnet.demo.shapes import write_shapes
from raycontrolnet.training import metrics
from raycontrolnet.tune import records

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # that of other tests
    os.environ["RAY_AUTH_MODE"] = "disabled"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    del os.environ["RAY_AUTH_MODE"]


def test_a_node_is_lost(cluster: Any, tiny_base: Path, tmp_path: Path) -> None:
    """Its trials go on from their checkpoints on the others."""
    lost = cluster.add_node(num_cpus=2)
    train = TrainConfig(
        pretrained_model_name_or_path=str(tiny_base),
        train_data_dir=str(write_shapes(tmp_path / "rows", 24, resolution=32)),
        output_dir=str(tmp_path / "sweep"),
        latents_cache_dir=str(tmp_path / "latents"),
        resolution=32,
        max_train_steps=200,
        validation_steps=10,
        validation_split=4,
        checkpointing_steps=10,
        report_to="none",
        seed=0,
    )
    folders = [tmp_path / "sweep" / "trials" / f"000{index}" for index in range(3)]

    def all_have_begun() -> bool:
        return all((folder / "checkpoint-20" / "manifest.json").is_file() for folder in folders)

    said = io.StringIO()
    with when(all_have_begun, lambda: cluster.remove_node(lost, allow_graceful=False)) as done:
        result = sweep(SweepConfig(train=train, num_samples=3, scheduler="none"), stream=said)
    assert done
    assert "3 at a time" in said.getvalue()
    assert [trial.record.state for trial in result.trials] == ["finished"] * 3
    for folder in folders:
        assert [line["step"] for line in metrics.read(folder / metrics.METRICS_FILE)] == list(range(1, 201))
    again = [folder for folder in folders if (folder / "run.log").read_text().count("settings: ") > 1]
    assert again, "a trial ran on the node that was lost"
    assert len(records.read_records(tmp_path / "sweep")) == 3
