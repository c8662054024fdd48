"""The number of workers with which an elastic run starts, or starts again."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray._private.state import state
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from raycontrolnet.cluster.elastic import ElasticPolicy


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> ElasticPolicy:
    """Return the policy of a run of 1 to 4 workers of a CPU; Ray has looked at the nodes a to c, of one each."""
    policy = ElasticPolicy(
        ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=0)
    )
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: {name: {"CPU": 1.0} for name in "abc"})
    return policy


def ray_says(monkeypatch: pytest.MonkeyPatch, alive: Collection[str], draining: Collection[str] = ()) -> None:
    nodes = [{"NodeID": name, "Alive": name in alive} for name in "abc"]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(state, "get_draining_nodes", lambda: dict.fromkeys(draining, 0))


def decision(policy: ElasticPolicy, running: int = 0) -> int | None:
    """Return the number of workers that are to be started; None to leave things as they are."""
    group: Any = SimpleNamespace(num_workers=running, start_time=0.0)
    status: Any = None
    found = (
        policy.make_decision_for_running_worker_group(group, status)
        if running
        else policy.make_decision_for_non_running_worker_group()
    )
    assert isinstance(found, ResizeDecision | NoopDecision)
    return found.num_workers if isinstance(found, ResizeDecision) else None


@pytest.mark.parametrize(
    ("alive", "draining", "wanted"),
    [
        ("abc", "", 3),
        ("ab", "", 2),
        ("abc", "c", 2),
        ("ab", "b", 1),
        ("ab", "bc", 1),
        ("a", "a", None),
        ("", "", None),
    ],
)
def test_nodes_that_are_gone_or_going_are_not_counted(
    policy: ElasticPolicy, monkeypatch: pytest.MonkeyPatch, alive: str, draining: str, wanted: int | None
) -> None:
    ray_says(monkeypatch, alive, draining)
    assert decision(policy) == wanted


def test_a_running_group_grows_and_does_not_shrink(policy: ElasticPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    ray_says(monkeypatch, "abc")
    assert decision(policy, running=2) == 3
    assert decision(policy, running=3) is None
    ray_says(monkeypatch, "abc", "c")
    assert decision(policy, running=1) == 2
    assert decision(policy, running=3) is None, "its checkpoint comes first"
