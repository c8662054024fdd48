"""A cluster whose nodes do not have the package: it travels with the run, as examples/train_on_cluster.py shows."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import ROOT, block, environment, run, write_workspace
from ray.runtime_env import RuntimeEnv
from test_job_submit import Head, assert_trained, ray_head

import raycontrolnet

pytestmark = pytest.mark.slow

REQUIRES = ["torch<2.14,>=2.8", "ray[data,default,train,tune]<2.61,>=2.60", "rich>=13", 'wandb>=0.19; extra == "wandb"']

WITHOUT_PACKAGE = '''"""Hides raycontrolnet from every Python, unless Ray has brought it as part of a runtime_env."""
import sys
from importlib.machinery import PathFinder


class Hide:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "raycontrolnet":
            return None
        brought = [entry for entry in sys.path if "/runtime_resources/" in entry]
        if spec := PathFinder.find_spec(name, brought):
            return spec
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hide)
'''


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Head]:
    """Provide a head none of whose processes can import the package by themselves."""
    workspace = write_workspace(tmp_path_factory.mktemp("cluster"), tiny_base)
    hidden = workspace / "without-package"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(WITHOUT_PACKAGE)
    with ray_head(workspace, environment(workspace) | {"PYTHONPATH": str(hidden)}) as head:
        yield head


def on_my_machine(head: Head, *command: str) -> str:
    """Return what a Python that has the package prints; it must succeed."""
    package = str(Path(raycontrolnet.__path__[0]).parent)
    shell = environment(head.workspace) | {"PYTHONPATH": package}
    result = run([sys.executable, *command], head.workspace, shell)
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_the_nodes_do_not_have_the_package(head: Head) -> None:
    probe = f"""
import ray
ray.init({head.address!r}, log_to_driver=False)
@ray.remote
def imports():
    try:
        import raycontrolnet
    except ModuleNotFoundError as error:
        return str(error)
print(ray.get(imports.remote()))
"""
    assert "No module named 'raycontrolnet'" in on_my_machine(head, "-c", probe)


def test_a_driver_brings_the_package(head: Head) -> None:
    output_dir = head.output_dir("by-driver")
    output = on_my_machine(head, "examples/train_on_cluster.py", "job/train.yaml", "--address", head.address)
    assert "2 updates in " in output
    assert str(output_dir) in output
    assert json.loads((output_dir / "run.json").read_text())["status"] == "finished"


def test_a_job_brings_the_package(head: Head) -> None:
    """The guide's command."""
    command, documented = block("runtime_env").command, "http://127.0.0.1:8265"
    assert documented in command
    output_dir = head.output_dir("by-job")
    python, *arguments = shlex.split(command.replace(documented, head.dashboard))
    assert python == "python"
    output = on_my_machine(head, *arguments)
    assert re.search(r"^raysubmit_\w+: succeeded$", output, re.M)
    assert_trained(output_dir, output)


def test_a_job_that_fails_is_told(head: Head) -> None:
    (head.workspace / "bad").mkdir()
    (head.workspace / "bad" / "train.yaml").write_text("resolution: 100\n")
    command = [sys.executable, "examples/train_on_cluster.py", "bad/train.yaml", "--submit", head.dashboard]
    package = str(Path(raycontrolnet.__path__[0]).parent)
    result = run(command, head.workspace, environment(head.workspace) | {"PYTHONPATH": package})
    assert result.returncode == 1
    assert "--resolution=100: must be divisible by 8; use 96 or 104" in result.stdout
    assert "failed" in result.stdout


def test_ray_job_submit_brings_the_package(head: Head) -> None:
    """The same without the example, as the guide says it."""
    package = raycontrolnet.__path__[0]
    output_dir = head.output_dir("by-command")
    environment_json = json.dumps({"py_modules": [package]})
    submitted = head.shell(
        f"ray job submit --address {head.dashboard} --working-dir job --runtime-env-json '{environment_json}' "
        "-- python -m raycontrolnet train --config train.yaml"
    )
    assert submitted.returncode == 0, submitted.stdout
    assert json.loads((output_dir / "run.json").read_text())["status"] == "finished"


def test_what_install_installs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the package needs but Ray, which the nodes have, and nothing of its extras."""
    monkeypatch.setattr("importlib.metadata.requires", lambda _: REQUIRES)
    runtime_env = runpy.run_path(str(ROOT / "examples" / "train_on_cluster.py"))["runtime_env"]
    assert "pip" not in runtime_env(install=False)
    assert RuntimeEnv(**runtime_env(install=True)).pip_config()["packages"] == ["torch<2.14,>=2.8", "rich>=13"]
