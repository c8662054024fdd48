"""examples/kuberay is what KubeRay and Ray's autoscaler accept, and does what its comments say."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from autoscaling import node_type_for
from kuberay_schema import load
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.runtime_env import RuntimeEnv

import raycontrolnet
from raycontrolnet import cli
from raycontrolnet.launch.running import LOOK_S

FOLDER = Path(__file__).parents[1] / "examples" / "kuberay"
FILES = {"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml"}
GPU_GROUPS = ("gpu-spot", "gpu-on-demand")


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def cluster_spec(kind: str) -> dict[str, Any]:
    spec: dict[str, Any] = read(FILES[kind])["spec"]
    return spec if kind == "RayCluster" else spec["rayClusterSpec"]


def autoscaling_config(kind: str) -> dict[str, Any]:
    """Return the settings that Ray's autoscaler makes of a cluster; it checks them."""
    return _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "raycontrolnet", "namespace": "default"}, "spec": with_defaults(cluster_spec(kind))}
    )


def with_defaults(spec: dict[str, Any]) -> dict[str, Any]:
    """Return what the Kubernetes API makes of `spec`."""
    spec["workerGroupSpecs"] = [{"replicas": 0, "numOfHosts": 1, **group} for group in spec["workerGroupSpecs"]]
    return spec


def pods(kind: str) -> dict[str, dict[str, Any]]:
    """Return group -> specification of its pods."""
    spec = cluster_spec(kind)
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]} | {"head": spec["headGroupSpec"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


@cache
def validator(kind: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(load(kind))


@pytest.mark.parametrize("kind", FILES)
def test_kuberay_accepts_it(kind: str) -> None:
    validator(kind).validate(read(FILES[kind]))


def rename(key: str) -> Callable[[dict[str, Any]], None]:
    def change(place: dict[str, Any]) -> None:
        place[f"{key}s"] = place.pop(key)

    return change


def text_for_number(place: dict[str, Any]) -> None:
    place["maxReplicas"] = "four"


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ((), rename("enableInTreeAutoscaling")),
        (("autoscalerOptions",), rename("version")),
        (("headGroupSpec",), rename("rayStartParams")),
        (("workerGroupSpecs", 0), rename("priority")),
        (("workerGroupSpecs", 0), text_for_number),
        (("workerGroupSpecs", 1, "template", "spec", "containers", 0), rename("volumeMounts")),
        (("workerGroupSpecs", 1, "template", "spec", "containers", 0, "lifecycle", "preStop"), rename("exec")),
        (("headGroupSpec", "template", "spec", "volumes", 0), rename("persistentVolumeClaim")),
    ],
)
@pytest.mark.parametrize("kind", FILES)
def test_a_misspelt_field_or_a_wrong_type_fails(
    kind: str, path: tuple[str | int, ...], change: Callable[[dict[str, Any]], None]
) -> None:
    document = copy.deepcopy(read(FILES[kind]))
    place = document["spec"] if kind == "RayCluster" else document["spec"]["rayClusterSpec"]
    for step in path:
        place = place[step]
    change(place)
    with pytest.raises(jsonschema.ValidationError):
        validator(kind).validate(document)


@pytest.mark.parametrize("kind", FILES)
def test_the_autoscaler_starts_pods_as_the_comments_say(kind: str) -> None:
    spec, config = cluster_spec(kind), autoscaling_config(kind)
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert not [name for name, each in types.items() if name != "headgroup" and each["min_workers"]]
    assert [types[name]["resources"]["GPU"] for name in GPU_GROUPS] == [1, 1]
    worker = {"GPU": 1, "CPU": 1}
    assert node_type_for(worker, config) == "gpu-spot"
    assert node_type_for(worker, config, {"gpu-spot": 0.0}) == "gpu-on-demand"
    assert node_type_for(worker, config, {"gpu-spot": 1.0}) == "gpu-spot"
    assert node_type_for({"GPU": 2}, config) is None
    assert node_type_for({"CPU": 1}, config) == ("cpu" if kind == "RayCluster" else "gpu-spot")


def test_the_clusters_of_both_are_the_same() -> None:
    cluster, job = cluster_spec("RayCluster"), cluster_spec("RayJob")
    cluster["workerGroupSpecs"] = [group for group in cluster["workerGroupSpecs"] if group["groupName"] in GPU_GROUPS]
    assert cluster == job


@pytest.mark.parametrize("kind", FILES)
def test_the_versions_are_the_package_s(kind: str) -> None:
    assert cluster_spec(kind)["rayVersion"] == ray.__version__
    images = {pod["containers"][0]["image"] for pod in pods(kind).values()}
    assert [image.startswith(f"rayproject/ray:{ray.__version__}-") for image in images] == [True]
    environment = yaml.safe_load(read("rayjob.yaml")["spec"]["runtimeEnvYAML"])
    assert environment["pip"] == [f"/mnt/shared/raycontrolnet-{raycontrolnet.__version__}-py3-none-any.whl"]
    assert RuntimeEnv(**environment).get("config")["setup_timeout_seconds"] > 600


@pytest.mark.parametrize("kind", FILES)
def test_all_pods_share_the_volume(kind: str) -> None:
    claim = read("shared.yaml")
    assert (claim["kind"], claim["spec"]["accessModes"]) == ("PersistentVolumeClaim", ["ReadWriteMany"])
    for pod in pods(kind).values():
        (volume,), (mount,) = pod["volumes"], pod["containers"][0]["volumeMounts"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert (mount["name"], mount["mountPath"]) == (volume["name"], "/mnt/shared")


@pytest.mark.parametrize("kind", FILES)
def test_a_checkpoint_has_the_time_that_it_needs(kind: str) -> None:
    for name, pod in pods(kind).items():
        container = pod["containers"][0]
        *_, command = container["lifecycle"]["preStop"]["exec"]["command"]
        seconds = float(command.rpartition(" ")[2])
        assert LOOK_S < seconds < pod["terminationGracePeriodSeconds"], name
        if name == "head":
            values = {each["name"]: each["value"] for each in container["env"]}
            assert LOOK_S < float(values["RAY_JOB_STOP_WAIT_TIME_S"]) <= seconds
        else:
            assert "ray drain-node" in command


def test_a_retry_of_the_job_goes_on(tmp_path: Path) -> None:
    """The entrypoint as the shell on the head sees it."""
    spec = read("rayjob.yaml")["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    assert spec["submissionMode"] == "HTTPMode"
    settings = "pretrained_model_name_or_path: base\ntrain_data_dir: data\n"
    (tmp_path / "train.yaml").write_text(settings, encoding="utf-8")
    entrypoint = spec["entrypoint"].replace("/mnt/shared", str(tmp_path))
    shell = f"raycontrolnet() {{ printf '%s\\n' \"$@\"; }}; {entrypoint}"
    command, *flags = subprocess.run(["sh", "-c", shell], check=True, capture_output=True, text=True).stdout.split()
    assert command == "train"
    config = cli.parse(command, flags)
    assert config.resume_from_checkpoint == "latest"
    assert (config.num_workers, config.use_gpu) == ("1:4", True)
