"""A Ray head of its own on this machine: jobs, and runs that connect to it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from documents import block, environment, run, write_workspace
from heads import free_ports, started_head

from raycontrolnet.training import metrics

pytestmark = pytest.mark.slow

UPDATES = 2
"""Updates of `job/train.yaml`, which `write_workspace` writes."""


@dataclass(frozen=True)
class Head:
    address: str
    """Value for `--address` of a run."""
    dashboard: str
    """Value for `--address` of `ray job submit`."""
    workspace: Path
    environment: dict[str, str]
    """Variables of the user's shell."""

    def output_dir(self, name: str) -> Path:
        """Let `job/train.yaml` name another output folder, and return it."""
        path = self.workspace / "job" / "train.yaml"
        settings = yaml.safe_load(path.read_text()) | {"output_dir": str(self.workspace / name)}
        path.write_text(yaml.safe_dump(settings))
        return self.workspace / name

    def shell(self, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return run(["bash", "-euo", "pipefail", "-c", command], self.workspace, self.environment | variables)


@contextmanager
def ray_head(workspace: Path, shell: dict[str, str]) -> Iterator[Head]:
    """Start a head with three CPUs: loading takes a whole one, which the workers must leave."""
    with started_head(workspace, shell, "--num-cpus=3") as addresses:
        yield Head(addresses.head, addresses.dashboard, workspace, shell)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Head]:
    """Provide a head without authentication."""
    workspace = write_workspace(tmp_path_factory.mktemp("cluster"), tiny_base)
    with ray_head(workspace, environment(workspace)) as head:
        yield head


def assert_trained(output_dir: Path, output: str) -> None:
    assert f"step {UPDATES}/{UPDATES} | loss" in output
    assert f"weights in {output_dir}" in output
    assert (output_dir / "diffusion_pytorch_model.safetensors").is_file()
    assert [record["step"] for record in metrics.read(output_dir / metrics.METRICS_FILE)] == list(range(1, UPDATES + 1))
    assert json.loads((output_dir / "run.json").read_text())["status"] == "finished"
    assert "Traceback" not in output


def test_readmes_job(head: Head) -> None:
    command, documented = block("job").command, "http://127.0.0.1:8265"
    assert documented in command
    output_dir = head.output_dir("from-job")
    submitted = head.shell(command.replace(documented, head.dashboard))
    assert submitted.returncode == 0, submitted.stdout
    assert "succeeded" in submitted.stdout
    (job,) = set(re.findall(r"raysubmit_\w+", submitted.stdout))
    assert_trained(output_dir, head.shell(f"ray job logs --address {head.dashboard} {job}").stdout)


def test_a_job_with_a_bad_setting_fails_with_the_message(head: Head) -> None:
    submitted = head.shell(f"ray job submit --address {head.dashboard} -- raycontrolnet train --resolution 100")
    assert submitted.returncode != 0
    assert "--resolution=100: must be divisible by 8; use 96 or 104" in submitted.stdout
    assert "failed" in submitted.stdout


def test_readmes_command_on_a_machine_of_the_cluster(head: Head) -> None:
    command, documented = block("cluster").command, "--address auto"
    assert documented in command
    output_dir = head.output_dir("from-address")
    # `auto` might find another Ray of this machine
    result = head.shell(command.replace(documented, f"--address {head.address}"))
    assert result.returncode == 0, result.stdout
    assert_trained(output_dir, result.stdout)


def test_ray_address_in_the_environment(head: Head) -> None:
    output_dir = head.output_dir("from-environment")
    result = head.shell("raycontrolnet train --config job/train.yaml", RAY_ADDRESS=head.address)
    assert result.returncode == 0, result.stdout
    assert_trained(output_dir, result.stdout)


def test_workers_that_leave_nothing_for_loading_are_refused(head: Head) -> None:
    head.output_dir("refused")
    command = f"raycontrolnet train --config job/train.yaml --address {head.address} --num_workers 3"
    result = head.shell(f"{command} --cpus_per_worker 1")
    assert result.returncode == 2
    assert "3 x 1 CPUs and 1 for loading data are more than the" in result.stdout


def test_a_head_that_asks_for_a_token(tmp_path: Path, tiny_base: Path) -> None:
    """As after a run of the user's own: the note on RAY_AUTH_MODE in clusters.md."""
    workspace = write_workspace(tmp_path / "reader", tiny_base)
    token = workspace / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("0123456789abcdef" * 4)
    shell = environment(workspace) | {"HOME": str(workspace / "home")}
    del shell["RAY_AUTH_MODE"]
    with ray_head(workspace, shell) as head:
        job = f"ray job submit --address {head.dashboard} --working-dir job -- raycontrolnet train --config train.yaml"
        refused = head.shell(job)
        assert refused.returncode != 0
        assert "AuthenticationError" in refused.stdout
        output_dir = head.output_dir("from-job")
        submitted = head.shell(job, RAY_AUTH_MODE="token")
        assert submitted.returncode == 0, submitted.stdout
        assert_trained(output_dir, submitted.stdout)
        output_dir = head.output_dir("from-address")
        command = f"raycontrolnet train --config job/train.yaml --address {head.address}"
        connected = head.shell(command)
        assert connected.returncode == 0, connected.stdout
        assert_trained(output_dir, connected.stdout)


@pytest.mark.parametrize("by_flag", [True, False])
def test_no_cluster_at_the_address(tmp_path: Path, tiny_base: Path, *, by_flag: bool) -> None:
    workspace = write_workspace(tmp_path / "reader", tiny_base)
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    origin, flags = ("--address", ["--address", address]) if by_flag else ("RAY_ADDRESS", [])
    variables = {} if by_flag else {"RAY_ADDRESS": address}
    command = ["raycontrolnet", "train", "--config", "job/train.yaml", *flags]
    result = run(["bash", "-c", " ".join(command)], workspace, environment(workspace) | variables)
    assert result.returncode == 2
    assert f"error: {origin}={address}: no Ray cluster answers there" in result.stdout
    assert "Traceback" not in result.stdout
