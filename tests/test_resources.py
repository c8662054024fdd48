"""The resources of workers: by arithmetic on made-up nodes, without Ray."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
import ray

from raycontrolnet.cluster import cpus, nodes, session
from raycontrolnet.cluster.resources import no_cpu_for_loading, share_out
from raycontrolnet.config.cluster_settings import ClusterConfig
from raycontrolnet.errors import ConfigError
from raycontrolnet.launch import waiting

Node = dict[str, float]
CPU_HEAD: Node = {"CPU": 8}
GPU_NODE: Node = {"CPU": 8, "GPU": 1, "accelerator_type:A10G": 1}


@pytest.mark.parametrize(
    ("num_workers", "nodes", "cpus", "threads"),
    [
        ("1", [{"CPU": 3}], 2, 2),  # our own Ray on 2 cores: one CPU more than there are, for loading
        ("2", [{"CPU": 3}], 1, 1),
        ("4", [{"CPU": 3}], 0.5, 1),
        ("1", [{"CPU": 2}], 1, 1),
        ("2", [{"CPU": 4}, {"CPU": 4}], 3, 3),
        ("3", [{"CPU": 4}, {"CPU": 4}], 1.5, 2),
        ("1:4", [{"CPU": 9}], 2, 2),
    ],
)
def test_share_of_the_cpus(num_workers: str, nodes: list[Node], cpus: float, threads: int) -> None:
    given = share_out(ClusterConfig(num_workers=num_workers), nodes, [])
    assert (given.cpus_per_worker, given.threads, given.use_gpu, given.waits_for) == (cpus, threads, False, None)


def test_gpus_are_used_where_there_are_some() -> None:
    assert share_out(ClusterConfig(), [CPU_HEAD, GPU_NODE], []).use_gpu
    assert not share_out(ClusterConfig(use_gpu=False), [CPU_HEAD, GPU_NODE], []).use_gpu
    assert not share_out(ClusterConfig(), [CPU_HEAD], []).use_gpu


def test_as_many_workers_as_cpus_on_a_gpu_machine() -> None:
    """4 GPUs and 4 CPUs: the workers share what loading leaves."""
    given = share_out(ClusterConfig(num_workers="4"), [{"CPU": 4, "GPU": 4}], [])
    assert (given.use_gpu, given.cpus_per_worker) == (True, 0.75)


def test_more_gpus_than_cpus_where_nobody_knows_what_may_come() -> None:
    """An elastic run uses all four, as a fixed one does."""
    for num_workers in ("4", "1:4"):
        given = share_out(ClusterConfig(num_workers=num_workers), [{"CPU": 2, "GPU": 4}], None)
        assert (given.use_gpu, given.cpus_per_worker) == (True, 0.25)


def test_an_autoscaler_may_bring_the_gpus() -> None:
    """No GPU node is up yet: the run waits for them, and says so, instead of training on the head's CPUs."""
    given = share_out(ClusterConfig(num_workers="4"), [CPU_HEAD], [GPU_NODE] * 4)
    assert (given.use_gpu, given.cpus_per_worker) == (True, 1)
    said = io.StringIO()
    given.say_what_is_awaited(said)
    assert re.fullmatch(r"waiting for the autoscaler: --use_gpu=True: the cluster has no GPU.*\n", said.getvalue())


def test_nothing_is_awaited_where_the_workers_have_room() -> None:
    said = io.StringIO()
    share_out(ClusterConfig(), [CPU_HEAD], []).say_what_is_awaited(said)
    assert said.getvalue() == ""


@pytest.mark.parametrize(
    ("may_come", "num_workers", "cpus"),
    [
        ([{"CPU": 16}] * 4, "4", 15),
        ([{"CPU": 16}] * 2, "1:4", 7.5),
        ([GPU_NODE], "1", 7),
        (None, "4", 1),  # on KubeRay nobody knows what may come
    ],
)
def test_a_head_without_cpus(may_come: list[Node] | None, num_workers: str, cpus: float) -> None:
    """Workers on CPUs get a share of the nodes that will come, not the least that there is."""
    given = share_out(ClusterConfig(num_workers=num_workers, use_gpu=False), [{}], may_come)
    assert (given.cpus_per_worker, given.use_gpu) == (cpus, False)
    assert given.waits_for is not None
    assert "and 1 for loading data are more than the" in given.waits_for


@pytest.mark.parametrize(
    ("num_workers", "nodes", "may_come", "cpus"),
    [
        ("1:4", [CPU_HEAD], [{"CPU": 8}] * 3, 7),
        ("1:4", [CPU_HEAD], [{"CPU": 16}] * 3, 7),  # the head has room for one now
        ("2:4", [CPU_HEAD], [{"CPU": 16}] * 3, 3.5),
        ("1:4", [CPU_HEAD], [{"CPU": 4}], 2.25),
        ("1:4", [CPU_HEAD, {"CPU": 16}], [], 5),
        ("1:4", [CPU_HEAD], None, 7),  # on KubeRay nobody knows what may come
        ("4", [CPU_HEAD], [{"CPU": 16}] * 3, 1.75),  # as many as fit need not wait
    ],
)
def test_an_autoscaler_may_bring_the_cpus(
    num_workers: str, nodes: list[Node], may_come: list[Node] | None, cpus: float
) -> None:
    """The most workers do not all fit on the nodes that are up: the cluster would not grow for them."""
    given = share_out(ClusterConfig(num_workers=num_workers), nodes, may_come)
    assert (given.cpus_per_worker, given.waits_for) == (cpus, None)


def test_a_head_without_cpus_and_without_an_autoscaler() -> None:
    with pytest.raises(ConfigError, match="1 x 1 CPUs and 1 for loading data are more than the 0 CPUs"):
        share_out(ClusterConfig(), [{}], [])


@pytest.mark.parametrize(
    ("settings", "nodes", "message"),
    [
        ({"use_gpu": True}, [CPU_HEAD], "--use_gpu=True: the cluster has no GPU; leave the flag out to train"),
        (
            {"num_workers": "4"},
            [{"CPU": 16, "GPU": 1}],
            "--num_workers=4: the cluster has room for 1 worker of 1 CPU and a GPU",
        ),
        (
            {"num_workers": "1", "cpus_per_worker": 6.0},
            [{"CPU": 4}, {"CPU": 4}],
            "--num_workers=1: the cluster has room for 0 workers of 6 CPUs",
        ),
        (
            {"num_workers": "1", "cpus_per_worker": 2.0},
            [{"CPU": 2}],
            "--num_workers=1, --cpus_per_worker=2: 1 x 2 CPUs and 1 for loading data are more than the 2 CPUs there",
        ),
        (
            {"accelerator_type": "H100"},
            [CPU_HEAD, GPU_NODE],
            "--num_workers=1: the cluster has room for 0 workers of 1 CPU and a GPU of type H100",
        ),
    ],
)
def test_what_cannot_fit_is_refused(settings: dict[str, Any], nodes: list[Node], message: str) -> None:
    """Ray would wait for it without end."""
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        share_out(ClusterConfig(**settings), nodes, [])


@pytest.mark.parametrize(
    ("settings", "nodes", "way_out"),
    [
        ({"num_workers": "4"}, [{"CPU": 16, "GPU": 1}], "; 1 would fit"),
        (
            {"cpus_per_worker": 6.0},
            [{"CPU": 4}, {"CPU": 4}],
            "; no such node has more than 4 CPUs: lower --cpus_per_worker",
        ),
        (
            {"accelerator_type": "H100"},
            [CPU_HEAD, GPU_NODE],
            "; no node has such GPUs: correct --accelerator_type, or le",
        ),
        (
            {"cpus_per_worker": 8.0},
            [{"CPU": 16}, {"CPU": 4, "GPU": 8}],
            "; no node with GPUs has 8 CPUs: lower --cpus_per_worker",
        ),
        (
            {"accelerator_type": "A10G", "cpus_per_worker": 12.0},
            [{"CPU": 16}, GPU_NODE],
            "; no such node has more than 8 CPUs: lower --cpus_per_worker",
        ),
    ],
)
def test_the_way_out_of_what_cannot_fit(settings: dict[str, Any], nodes: list[Node], way_out: str) -> None:
    """There are CPUs enough, but on no node as many as a worker takes; it is the same for nodes that may come."""
    for up, may_come in ((nodes, []), ([], nodes)):
        with pytest.raises(ConfigError, match=re.escape(way_out)) as error:
            share_out(ClusterConfig(**settings), up, may_come)
        assert error.value.exit_code == 2
        assert len(str(error.value)) < 250


def test_an_autoscaler_that_has_started_all_it_may(bootstrap_config: Path) -> None:
    """Its maximum counts the nodes that are up; those of one type count for that type's."""
    bootstrap_config.write_text(
        "available_node_types: {gpu: {resources: {CPU: 8, GPU: 1}, max_workers: 2}, cpu: {resources: {CPU: 16}}}\n"
        "max_workers: 3\n"
    )
    gpu, cpu = {"CPU": 8.0, "GPU": 1.0}, {"CPU": 16.0}
    assert nodes.nodes_that_may_come(ClusterConfig(), [gpu]) == [gpu, cpu]
    assert nodes.nodes_that_may_come(ClusterConfig(), [gpu, cpu, cpu]) == []
    up = [gpu, gpu, cpu]
    with pytest.raises(ConfigError, match=r"^--num_workers=3: the cluster has room for 2 workers of .*; 2 would fit$"):
        share_out(ClusterConfig(num_workers="3"), up, nodes.nodes_that_may_come(ClusterConfig(), up))


def test_more_than_an_autoscaler_may_bring_is_refused() -> None:
    """64 workers, and two nodes at most; where nobody knows what may come, as on KubeRay, the run waits."""
    grown = ", with the 2 nodes that its autoscaler may add,"
    refused = {
        "64": "--num_workers=64: 64 x 1 CPUs and 1 for loading data are more than the 24 CPUs there are, with",
        "4": f"--num_workers=4: the cluster{grown} has room for 2 workers of 1 CPU and a GPU",
    }
    for num_workers, message in refused.items():
        with pytest.raises(ConfigError, match=f"^{message}"):
            share_out(ClusterConfig(num_workers=num_workers), [CPU_HEAD], [GPU_NODE] * 2)
    waits_for = share_out(ClusterConfig(num_workers="64", use_gpu=True), [CPU_HEAD], None).waits_for
    assert waits_for is not None
    assert waits_for.startswith("the autoscaler: --use_gpu=True: the cluster has no GPU")


def test_nodes_whose_resources_nobody_has_written_down(bootstrap_config: Path) -> None:
    """As those of a local provider: the run waits for them."""
    bootstrap_config.write_text("available_node_types: {worker: {resources: {}, max_workers: 3}}\nmax_workers: 3\n")
    assert nodes.nodes_that_may_come(ClusterConfig(), []) is None


ONE_TYPE = "available_node_types: {worker: {resources: {CPU: 8}, max_workers: 3}}\nmax_workers: 3\n"


def test_what_an_earlier_cluster_left_is_not_waited_for(
    bootstrap_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the name that a pod has of it: the Ray is our own."""
    bootstrap_config.write_text(ONE_TYPE)
    assert nodes.nodes_that_may_come(ClusterConfig(), []) == [{"CPU": 8}] * 3
    monkeypatch.setattr(session, "_own", True)
    assert nodes.nodes_that_may_come(ClusterConfig(), []) == []
    bootstrap_config.unlink()
    monkeypatch.setenv(nodes.KUBERAY_VARIABLE, "earlier")
    assert nodes.nodes_that_may_come(ClusterConfig(), []) == []


def test_an_autoscaler_that_does_not_run(
    bootstrap_config: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It has died, or another Ray was started by hand where it was; one that runs by another file does not count."""
    left = bootstrap_config.with_name("left.yaml")
    left.write_text(ONE_TYPE)
    monkeypatch.setattr(nodes, "BOOTSTRAP_CONFIG", left)
    assert nodes.nodes_that_may_come(ClusterConfig(), []) == []
    assert f"{left} is of an autoscaler that does not run on this machine" in caplog.text


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "350000 100000\n"}, 3),
        ({"cpu.max": "20000 100000\n"}, 1),
        ({"cpu.max": "12800000 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
    ],
)
def test_a_container_limits_the_cpus_of_the_machine(
    files: dict[str, str], most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cpus, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert cpus.machine_cpus() == most


def test_the_autoscaler_is_found_by_its_configuration(bootstrap_config: Path) -> None:
    assert nodes.nodes_that_may_come(ClusterConfig(), []) == []
    bootstrap_config.write_text(
        "available_node_types: {head: {resources: {CPU: 8}, max_workers: 0}, gpu: {resources: {CPU: 8, GPU: 1}}}"
    )
    assert nodes.nodes_that_may_come(ClusterConfig(), []) == [{"CPU": 8, "GPU": 1}] * 2


def test_workers_of_several_runs_that_leave_loading_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each leaves one CPU, which the next takes: both would wait for data without end, and say so."""

    def group(*cpus: float, state: str = "CREATED") -> dict[str, Any]:
        return {"state": state, "bundles": {place: {"CPU": each} for place, each in enumerate(cpus)}}

    groups: dict[str, dict[str, Any]] = {"a": group(1)}
    monkeypatch.setattr(ray.util, "placement_group_table", lambda: groups)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    said, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("raycontrolnet.launch.waiting.time.monotonic", lambda: clock[0])
    news = waiting._LoadingNews(said)

    def look(seconds: float) -> str:
        said.truncate(said.seek(0))
        for _ in range(round(seconds / waiting.LOADING_LOOK_S)):
            clock[0] += waiting.LOADING_LOOK_S
            news.look()
        return said.getvalue()

    assert no_cpu_for_loading() is None
    assert look(100) == ""
    groups |= {"gone": group(9, state="REMOVED"), "later": group(9, state="PENDING"), "b": group(1)}
    problem = (
        "workers, of this run and others, hold 2 of the cluster's 2 CPUs, and loading data needs 1; end another run, "
        "or start all with --cpus_per_worker 0.5"
    )
    assert look(40) == f"waiting for data, 0:30: {problem}\n"
    assert look(60) == f"waiting for data, 1:00: {problem}\n"
    del groups["b"]
    assert look(100) == ""
    groups["b"] = group(*(0.25,) * 8)
    assert str(no_cpu_for_loading()).endswith("loading data needs 1; end another run")
