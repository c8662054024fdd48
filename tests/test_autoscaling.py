"""Runs on a cluster that has a head alone, whose autoscaler starts nodes for them.

The nodes have CPUs: a GPU that is only declared cannot be trained on.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from autoscaling_cluster import AutoscalingCluster, autoscaling_cluster
from processes import wait_for, when
from runs import Settings, contents, losses, run

from raycontrolnet import SweepConfig, TrainConfig, fit, prepare, sweep
from raycontrolnet.cluster import nodes
from raycontrolnet.cluster.session import ray_session
from raycontrolnet.cluster.tokens import MODE, token_mode_kept
from raycontrolnet.demo.shapes import write_shapes
from raycontrolnet.latents import ensure
from raycontrolnet.latents.encoder import LatentEncoder
from raycontrolnet.latents.manifest import SHARD_ROWS
from raycontrolnet.latents.shards import EncodedShard, EncodeJob, LoadedShard, ShardResult

pytestmark = pytest.mark.slow

GONE_TIMEOUT_S = 90.0
"""For the nodes to go, after IDLE_MINUTES and what Ray takes."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AutoscalingCluster]:
    ray.shutdown()  # that of other tests
    with pytest.MonkeyPatch.context() as patch, token_mode_kept():
        os.environ.pop(MODE, None)  # a Ray of this machine alone, as other tests' was, sets it
        types = {"cpu": {"resources": {"CPU": 1}, "max_workers": 3}}
        with autoscaling_cluster(tmp_path_factory.mktemp("cluster"), types) as found:
            patch.setattr(nodes, "BOOTSTRAP_CONFIG", found.config)
            with ray_session(found.address):
                yield found


def test_nodes_come_for_a_run_and_go(cluster: AutoscalingCluster, tiny_settings: Settings, tmp_path: Path) -> None:
    settings = tiny_settings | {"num_workers": "2", "cpus_per_worker": 0.75, "train_batch_size": 2}
    assert cluster.num_nodes() == 0
    said, out = io.StringIO(), tmp_path / "out"
    with when(lambda: cluster.num_nodes() >= 2, lambda: None) as both_came:
        fit(TrainConfig(**settings | {"output_dir": str(out)}), stream=said)
    assert both_came
    assert "waiting for the autoscaler: --num_workers=2" in said.getvalue()
    whole = run(settings, tmp_path / "whole", num_workers="0", gradient_accumulation_steps=2)
    assert losses(out) == pytest.approx(losses(whole), rel=0, abs=1e-5)
    wait_for(lambda: cluster.num_nodes() == 0, GONE_TIMEOUT_S)


NUM_SHARDS = 30
ENCODING_S = 3.0


class SlowJob(EncodeJob):
    """Encoding that takes a while, and no CPU from the nodes that are to come."""

    def encode(self, loaded: LoadedShard | ShardResult, encoder: LatentEncoder) -> EncodedShard | ShardResult:
        time.sleep(ENCODING_S)
        return super().encode(loaded, encoder)


def test_nodes_come_for_latents(
    cluster: AutoscalingCluster, tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_shapes(tmp_path / "rows", NUM_SHARDS * SHARD_ROWS, resolution=16)
    folder, here = tmp_path / "cache", tmp_path / "here"
    settings = tiny_settings | {"train_data_dir": str(rows), "resolution": 16, "latents_cache_dir": str(folder)}
    prepare(TrainConfig(**settings | {"latents_cache_dir": str(here), "num_workers": "0"}), stream=io.StringIO())
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the nodes do not have this module
    monkeypatch.setattr(ensure, "EncodeJob", SlowJob)
    said = io.StringIO()
    with when(lambda: cluster.num_nodes() == 3, lambda: None) as all_came:
        prepare(TrainConfig(**settings | {"num_workers": "1:3", "cpus_per_worker": 0.75}), stream=said)
    assert all_came
    assert "waiting for the autoscaler: --num_workers=1:3" in said.getvalue()
    cached = [{name: file for name, file in contents(of).items() if name.endswith(".arrow")} for of in (folder, here)]
    assert len(cached[0]) == NUM_SHARDS
    assert cached[0] == cached[1]


def test_nodes_come_for_trials(cluster: AutoscalingCluster, sweep_settings: Settings) -> None:
    """Two of three trials have room at a time; the third gets the node of one that has ended, or was stopped."""
    train = TrainConfig(**sweep_settings | {"cache_latents": "off", "max_train_steps": 16, "validation_steps": 4})
    space = {"learning_rate": {"grid": [4e-3, 1e-9, 0.3]}}
    said = io.StringIO()
    with when(lambda: cluster.num_nodes() >= 2, lambda: None) as both_came:
        result = sweep(SweepConfig(train=train, space=space, num_samples=1), stream=said)
    assert both_came
    assert "2 at a time" in said.getvalue()
    assert {trial.record.state for trial in result.trials} <= {"finished", "stopped"}
    assert len([trial for trial in result.trials if trial.reports]) == 3
    wait_for(lambda: cluster.num_nodes() == 0, GONE_TIMEOUT_S)
