"""cluster.yaml passes the checks that `ray up` makes before it reaches out to AWS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER_YAML = Path(__file__).parents[1] / "cluster.yaml"


@pytest.fixture
def written() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER_YAML.read_text(encoding="utf-8"))


@pytest.fixture
def prepared(written: dict[str, Any]) -> dict[str, Any]:
    return prepare_config(written)


def test_ray_accepts_it(prepared: dict[str, Any]) -> None:
    validate_config(prepared)
    prepared["max_worker"] = 4  # the check sees misspelt settings
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepared)


def test_gpu_workers_start_at_none_and_the_head_has_no_gpu(prepared: dict[str, Any]) -> None:
    types = prepared["available_node_types"]
    assert set(types) == {"head", "gpu_worker"}, "Ray's default node types must not come along"
    assert prepared["head_node_type"] == "head"
    assert types["gpu_worker"]["min_workers"] == 0
    assert 0 < types["gpu_worker"]["max_workers"] <= prepared["max_workers"]
    # No instance of the m5 family has a GPU, every one of g5 has; Ray reads the counts from AWS unless they are given.
    assert types["head"]["node_config"]["InstanceType"].startswith("m5.")
    assert types["gpu_worker"]["node_config"]["InstanceType"].startswith("g5.")
    assert not types["head"]["resources"].get("GPU")


def test_idle_nodes_are_given_back(prepared: dict[str, Any]) -> None:
    assert 0 < prepared["idle_timeout_minutes"] <= 30
    assert prepared["provider"]["cache_stopped_nodes"] is False


def test_every_node_installs_the_package(prepared: dict[str, Any]) -> None:
    image = prepared["docker"]["image"]
    assert image.startswith(f"rayproject/ray:{ray.__version__}-"), "the package's Ray, of which no other is allowed"
    for commands in ("head_setup_commands", "worker_setup_commands"):
        assert any("pip install" in command and "raycontrolnet" in command for command in prepared[commands])
