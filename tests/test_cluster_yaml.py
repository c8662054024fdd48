"""cluster.yaml passes the checks that `ray up` makes before it reaches out to AWS, and starts what its comments say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from autoscaling import node_type_for
from ray.autoscaler._private.util import prepare_config, validate_config

from raycontrolnet.cluster import nodes, session
from raycontrolnet.config.cluster_settings import ClusterConfig

CLUSTER_YAML = Path(__file__).parents[1] / "cluster.yaml"
RESOURCES: dict[str, dict[str, float]] = {
    "head": {"CPU": 0},
    "gpu_worker": {"CPU": 8, "memory": 24051816857, "GPU": 1, "accelerator_type:A10G": 1},
    "cpu_worker": {"CPU": 16, "memory": 48103633715},
}
"""Resources that Ray fills in from AWS's descriptions of the instance types, which test_ec2.py checks."""
SPOT = {"MarketType": "spot"}


@pytest.fixture
def written() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER_YAML.read_text(encoding="utf-8"))


@pytest.fixture
def prepared(written: dict[str, Any]) -> dict[str, Any]:
    return prepare_config(written)


@pytest.fixture
def on_the_head(prepared: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that `ray up` leaves on the head, with the resources of all types."""
    for name, kind in prepared["available_node_types"].items():
        kind["resources"] = dict(RESOURCES[name])
    return prepared


def test_ray_accepts_it(prepared: dict[str, Any]) -> None:
    validate_config(prepared)
    prepared["max_worker"] = 4  # the check sees misspelt settings
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepared)


def test_a_misspelt_field_of_a_type_fails(prepared: dict[str, Any]) -> None:
    gpu_worker = prepared["available_node_types"]["gpu_worker"]
    gpu_worker["max_worker"] = gpu_worker.pop("max_workers")
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepared)


def test_nothing_is_missing_that_ray_adds_for_aws_alone(written: dict[str, Any], prepared: dict[str, Any]) -> None:
    """Ray gives its defaults for AWS to providers of type `aws`, and ours is another to it."""
    of_aws = written | {"provider": {**written["provider"], "type": "aws"}}
    del of_aws["provider"]["module"]
    for name in ("upscaling_speed", "cluster_synced_files", "rsync_exclude", "rsync_filter", "worker_setup_commands"):
        assert of_aws.pop(name) is not None
    expected = prepare_config(of_aws)
    assert {name: value for name, value in expected.items() if name != "provider"} == {
        name: prepared[name] for name in expected if name != "provider"
    }


def test_the_types_of_nodes(prepared: dict[str, Any]) -> None:
    types = prepared["available_node_types"]
    assert list(types) == ["head", "gpu_worker", "cpu_worker"], "Ray's default node types must not come along"
    assert prepared["head_node_type"] == "head"
    assert (types["head"]["resources"], types["head"]["max_workers"]) == ({"CPU": 0}, 0)
    # No instance of the m5 family has a GPU, every one of g5 has; Ray reads the counts from AWS unless they are given.
    families = {"head": "m5.", "gpu_worker": "g5.", "cpu_worker": "m5."}
    for name, kind in types.items():
        assert set(kind) == {"resources", "node_config", "min_workers", "max_workers"}, "Ray adds the head's 0"
        assert kind["node_config"]["InstanceType"].startswith(families[name])
        assert kind["node_config"]["ImageId"] == types["head"]["node_config"]["ImageId"]
        assert kind["node_config"].get("InstanceMarketOptions") == (None if name == "head" else SPOT)
    for name in ("gpu_worker", "cpu_worker"):
        assert types[name]["min_workers"] == 0
        assert 0 < types[name]["max_workers"] <= prepared["max_workers"]


def test_the_type_that_the_autoscaler_starts(on_the_head: dict[str, Any]) -> None:
    validate_config(on_the_head)
    assert node_type_for({"GPU": 1, "CPU": 1}, on_the_head) == "gpu_worker"
    assert node_type_for({"CPU": 1}, on_the_head) == "cpu_worker"
    assert node_type_for({"CPU": 12}, on_the_head) == "cpu_worker"
    assert node_type_for({"GPU": 2}, on_the_head) is None


@pytest.mark.parametrize(
    ("use_gpu", "up", "expected"),
    [
        (None, [], ["gpu_worker"] * 4 + ["cpu_worker"] * 2),
        (False, [], ["cpu_worker"] * 4 + ["gpu_worker"] * 2),
        (None, ["gpu_worker", "cpu_worker"], ["gpu_worker"] * 3 + ["cpu_worker"]),
    ],
)
def test_the_nodes_that_a_run_expects(
    use_gpu: bool | None,
    up: list[str],
    expected: list[str],
    on_the_head: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The best for the run first, and no more than `max_workers` together."""
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(yaml.safe_dump(on_the_head), encoding="utf-8")
    monkeypatch.setattr(nodes, "BOOTSTRAP_CONFIG", file)
    monkeypatch.setattr(nodes, "_runs_by", lambda found: found == file)
    monkeypatch.setattr(session, "_own", False)
    there: list[nodes.Node] = [{nodes.HEAD: 1.0}, *(RESOURCES[name] for name in up)]
    found = nodes.nodes_that_may_come(ClusterConfig(use_gpu=use_gpu), there)
    assert found is not None
    assert found == [RESOURCES[name] for name in expected]


def test_idle_nodes_are_given_back(prepared: dict[str, Any]) -> None:
    assert 0 < prepared["idle_timeout_minutes"] <= 30
    assert prepared["provider"]["cache_stopped_nodes"] is False


def test_every_node_installs_the_package(prepared: dict[str, Any]) -> None:
    image = prepared["docker"]["image"]
    assert image.startswith(f"rayproject/ray:{ray.__version__}-"), "the package's Ray, of which no other is allowed"
    for commands in ("head_setup_commands", "worker_setup_commands"):
        assert any("pip install" in command and "raycontrolnet" in command for command in prepared[commands])


def test_the_nodes_need_no_disk_in_common(prepared: dict[str, Any]) -> None:
    """Everything that a run reads and writes is in S3, which the head may use by Ray's profile, and so may workers."""
    head, _, settings = CLUSTER_YAML.read_text(encoding="utf-8").partition("\ncluster_name: ")
    assert re.findall(r"--(\w+) s3://BUCKET/", head) == ["train_data_dir", "latents_cache_dir", "output_dir"]
    assert "/mnt/" not in settings
    for name in ("gpu_worker", "cpu_worker"):
        profile = prepared["available_node_types"][name]["node_config"]["IamInstanceProfile"]
        assert profile == {"Name": "ray-autoscaler-v1"}, "Ray's own, which the head has by default"
