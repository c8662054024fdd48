"""Spot instances and what stands in for them, against a stand-in for EC2 (moto); the notice of a reclaim."""

from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from documents import environment, run
from processes import wait_for
from ray.autoscaler._private.providers import _get_node_provider_cls
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent
from test_cluster_yaml import CLUSTER_YAML, RESOURCES
from test_job_submit import ray_head
from test_tokens import TOKEN

from raycontrolnet.cluster import reclaim

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto")

TAGS = {TAG_RAY_USER_NODE_TYPE: "gpu_worker", "ray-node-name": "worker"}


@pytest.fixture(scope="module")
def bootstrapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """cluster.yaml as `ray up` makes it ready, in an account of AWS that is empty."""
    with pytest.MonkeyPatch.context() as patch, moto.mock_aws():
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray writes an SSH key
        # moto takes half a minute to learn AWS's own policies.
        patch.setattr("ray.autoscaler._private.aws.config._configure_iam_role", lambda config: config)
        config = prepare_config(yaml.safe_load(CLUSTER_YAML.read_text(encoding="utf-8")))
        images = boto3.client("ec2", region_name=config["provider"]["region"]).describe_images()["Images"]
        for kind in config["available_node_types"].values():
            kind["node_config"]["ImageId"] = images[0]["ImageId"]
        # Which `_configure_iam_role` makes for the head.
        profile = config["available_node_types"]["gpu_worker"]["node_config"]["IamInstanceProfile"]["Name"]
        boto3.client("iam").create_instance_profile(InstanceProfileName=profile)
        provider_cls = _get_node_provider_cls(config["provider"])
        yield provider_cls.bootstrap_config(provider_cls.fillout_available_node_types_resources(config))


@pytest.fixture
def ready(bootstrapped: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(bootstrapped)


class Ec2:
    """EC2 that has no instances of some markets."""

    def __init__(self, real: Any, sold_out: tuple[str, ...]):
        self.real, self.sold_out = real, sold_out
        self.asked: list[tuple[str, str, int]] = []
        """(market, subnet, number of instances) of every request."""

    def create_instances(self, **request: Any) -> Any:
        from botocore.exceptions import ClientError

        market = request.get("InstanceMarketOptions", {}).get("MarketType", "on demand")
        self.asked.append((market, request["SubnetId"], request["MaxCount"]))
        if market in self.sold_out:
            error = {"Code": "InsufficientInstanceCapacity", "Message": "There is no Spot capacity available"}
            raise ClientError({"Error": error}, "RunInstances")
        return self.real.create_instances(**request)


def start(config: dict[str, Any], *sold_out: str) -> tuple[dict[str, Any], Ec2]:
    """Return the instances that the provider starts for two GPU nodes, and what it asked EC2."""
    provider = _get_node_provider_cls(config["provider"])(config["provider"], config["cluster_name"])
    provider.ec2_fail_fast = ec2 = Ec2(provider.ec2_fail_fast, sold_out)
    node_config = config["available_node_types"]["gpu_worker"]["node_config"]
    before = json.dumps(node_config, sort_keys=True)
    try:
        return provider.create_node_with_resources_and_labels(node_config, TAGS, 2, {}, {}), ec2
    finally:
        assert json.dumps(node_config, sort_keys=True) == before, "the next node asks for spot again"


def test_ray_makes_it_ready_and_finds_the_resources(ready: dict[str, Any]) -> None:
    del ready["head_node"]  # as `ray up` does with what it leaves on the head, where the autoscaler checks it again
    assert set(AutoscalingConfig(ready).get_node_type_configs()) == set(RESOURCES)
    assert {name: kind["resources"] for name, kind in ready["available_node_types"].items()} == RESOURCES
    assert len(ready["available_node_types"]["gpu_worker"]["node_config"]["SubnetIds"]) == 3


def test_spot_instances_where_there_are_some(ready: dict[str, Any]) -> None:
    created, ec2 = start(ready)
    assert created
    assert [(market, count) for market, _, count in ec2.asked] == [("spot", 2)]


def test_on_demand_instances_where_no_zone_has_spot_instances(
    ready: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    created, ec2 = start(ready, "spot")
    assert created
    for instance in created.values():
        assert instance.instance_type == "g5.2xlarge"
        assert {"Key": TAG_RAY_USER_NODE_TYPE, "Value": "gpu_worker"} in instance.tags
    *refused, (market, _, count) = ec2.asked
    assert (market, count) == ("on demand", 2)
    assert {market for market, _, _ in refused} == {"spot"}
    subnets = ready["available_node_types"]["gpu_worker"]["node_config"]["SubnetIds"]
    assert {subnet for _, subnet, _ in refused} == set(subnets), "every zone is tried"
    assert "no spot instance of type g5.2xlarge (InsufficientInstanceCapacity): starting 2 on demand" in caplog.text


def test_nothing_is_left(ready: dict[str, Any]) -> None:
    with pytest.raises(NodeLaunchException, match="InsufficientInstanceCapacity"):
        start(ready, "spot", "on demand")


def test_on_demand_alone(ready: dict[str, Any]) -> None:
    """Without the line of cluster.yaml that asks for spot instances, as its comment says."""
    del ready["available_node_types"]["gpu_worker"]["node_config"]["InstanceMarketOptions"]
    _, ec2 = start(ready)
    assert [market for market, _, _ in ec2.asked] == ["on demand"]
    with pytest.raises(NodeLaunchException):
        start(ready, "on demand")


def test_ray_alone_does_not_turn_to_another_type() -> None:
    """The reason for a provider of our own; when it fails, a node type for on-demand instances does as well."""
    monitor = CloudResourceMonitor()
    for status in (Instance.ALLOCATION_FAILED, Instance.ALLOCATION_TIMEOUT):
        assert not monitor.get_recoverable_resource_availabilities()
        monitor.notify([InstanceUpdateEvent(instance_type="gpu_worker", new_instance_status=status)])
    assert monitor.get_recoverable_resource_availabilities() == {"gpu_worker": 0.0}


@pytest.fixture
def metadata_service() -> Iterator[tuple[str, dict[str, bytes]]]:
    """EC2's metadata service: its URL, and path -> what it answers there, to those with a token."""
    answers: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: bytes | None) -> None:
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"")

        def do_PUT(self) -> None:
            self.answer(b"a-token" if self.path == "/latest/api/token" else None)

        def do_GET(self) -> None:
            known = self.headers["X-aws-ec2-metadata-token"] == "a-token"
            self.answer(answers.get(self.path) if known else None)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", answers
        server.shutdown()


ACTION = "/latest/meta-data/spot/instance-action"


def notice(seconds: float) -> bytes:
    at = datetime.now(timezone.utc) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")}).encode()


def test_the_notice_is_read(metadata_service: tuple[str, dict[str, bytes]]) -> None:
    url, answers = metadata_service
    assert reclaim.seconds_left(url) is None, "nothing is planned"
    answers[ACTION] = notice(120)
    assert 110 < (reclaim.seconds_left(url) or 0) <= 120
    answers[ACTION] = notice(-5)
    assert reclaim.seconds_left(url) == 0
    for nonsense in (b"", b"{}", b"<html>", b'{"time": "soon"}', b'["time"]', b'{"time": 5}'):
        answers[ACTION] = nonsense
        assert reclaim.seconds_left(url) is None
    assert reclaim.seconds_left("http://127.0.0.1:9") is None, "nobody answers"


@pytest.mark.parametrize("code", [0, 1])
def test_ray_is_told(metadata_service: tuple[str, dict[str, bytes]], tmp_path: Path, code: int) -> None:
    url, answers = metadata_service
    answers[ACTION] = notice(120)
    program = tmp_path / "ray"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told\nexit {code}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "raycontrolnet.cluster.reclaim", "10.0.0.1:6379"]
    environment = os.environ | {"PATH": path, "AWS_EC2_METADATA_SERVICE_ENDPOINT": url}
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == code
    told = (tmp_path / "told").read_text()
    assert "drain-node --address 10.0.0.1:6379 --reason DRAIN_NODE_REASON_PREEMPTION" in told
    assert 100 < int(told.split()[-1]) <= 120


@pytest.mark.slow
@pytest.mark.parametrize("asks", [False, True])
def test_ray_gives_the_node_up(metadata_service: tuple[str, dict[str, bytes]], tmp_path: Path, *, asks: bool) -> None:
    """A node without work ends as soon as Ray hears of it; the command must not start a Ray of its own instead."""
    url, answers = metadata_service
    answers[ACTION] = notice(120)
    shell = environment(tmp_path) | {"AWS_EC2_METADATA_SERVICE_ENDPOINT": url, "HOME": str(tmp_path)}
    if asks:  # as of itself where there is a token
        del shell["RAY_AUTH_MODE"]
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    with ray_head(tmp_path, shell) as head, grpc.insecure_channel(head.address) as channel:
        shown = [("authorization", f"Bearer {TOKEN}")] if asks else []

        def state() -> int:
            found = NodeInfoGcsServiceStub(channel).GetAllNodeInfo(GetAllNodeInfoRequest(), metadata=shown)
            (node,) = found.node_info_list
            return int(node.state)

        assert state() == GcsNodeInfo.ALIVE
        told = run([sys.executable, "-m", "raycontrolnet.cluster.reclaim", head.address], tmp_path, shell)
        assert told.returncode == 0, told.stdout
        assert "EC2 reclaims this instance in " in told.stdout
        assert "Started a local Ray" not in told.stdout
        wait_for(lambda: state() == GcsNodeInfo.DEAD, timeout_s=60)
