"""A sweep on a cluster of several nodes, of which one is lost."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import last_step, when

from raycontrolnet import SweepConfig, TrainConfig, sweep
from raycontrolnet.cluster.session import ray_session
from raycontrolnet.demo.shapes import write_shapes
from raycontrolnet.training import metrics
from raycontrolnet.tune import records

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # that of other tests
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    with ray_session(cluster.address):
        yield cluster
    cluster.shutdown()


@pytest.fixture
def train(tiny_base: Path, tmp_path: Path) -> TrainConfig:
    """Return the settings of a trial of 200 updates."""
    return TrainConfig(
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


def test_a_node_is_lost(cluster: Any, train: TrainConfig) -> None:
    """Its trials go on from their checkpoints on the others."""
    lost = cluster.add_node(num_cpus=2)
    folders = [Path(train.output_dir) / "trials" / f"000{index}" for index in range(3)]

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
    assert len(records.read_records(Path(train.output_dir))) == 3


def test_a_node_is_reclaimed(cluster: Any, train: TrainConfig) -> None:
    """At Ray's notice its trials write a checkpoint, from which they go on; it is no failure."""
    import ray

    lost = cluster.add_node(num_cpus=2)
    train = replace(train, max_train_steps=400, checkpointing_steps=10_000, max_failures=0)
    folders = [Path(train.output_dir) / "trials" / f"000{index}" for index in range(3)]

    def reclaim() -> None:
        gcs = ray._raylet.GcsClient(address=cluster.address)
        accepted, why = gcs.drain_node(lost.node_id, 2, "spot", int((time.time() + 10) * 1000))  # 2: PREEMPTION
        assert accepted, why
        time.sleep(10)
        cluster.remove_node(lost, allow_graceful=False)

    with when(lambda: all(last_step(folder) >= 10 for folder in folders), reclaim) as done:
        result = sweep(SweepConfig(train=train, num_samples=3, scheduler="none"), stream=io.StringIO())
    assert done
    assert [trial.record.state for trial in result.trials] == ["finished"] * 3
    begun = [re.findall(r"update (\d+) on: ", (folder / "run.log").read_text()) for folder in folders]
    moved = [starts[1] for starts in begun if len(starts) > 1]
    assert moved, "a trial ran on the node that was reclaimed"
    assert min(map(int, moved)) >= 10, "it went on from the checkpoint at the notice"
    for folder in folders:
        assert [line["step"] for line in metrics.read(folder / metrics.METRICS_FILE)] == list(range(1, 401))
