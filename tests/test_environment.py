"""Variables of the driver's environment, as NCCL's, reach the processes of a cluster; its secrets do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray.train import RunConfig, ScalingConfig

from raycontrolnet.cluster.environment import JOB_CONFIG, PREFIXES, passed_on, passed_on_to_job
from raycontrolnet.cluster.trainer import InterruptibleTrainer
from raycontrolnet.tune.trial_function import trial_function

DRIVERS = {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "lo", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
OWN = {
    "HF_TOKEN": "hf_secret", "AWS_SECRET_ACCESS_KEY": "secret", "WANDB_API_KEY": "secret", "COMET_API_KEY": "secret",
    "CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "64", "HOME": "/home/me", "PATH": "/bin", "MY_NCCL_TOKEN": "secret",
}  # fmt: skip
"""Variables that stay with the driver."""
DRIVER = """
import json, os, sys
import ray
from raycontrolnet.cluster.session import ray_session

def looked_up():
    return dict(os.environ)

with ray_session(sys.argv[1]):
    print(json.dumps(ray.get(ray.remote(num_cpus=0)(looked_up).remote())))
"""


def test_which_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "TORCH_LOGS": "+dynamo"}
    assert passed_on(DRIVERS | OWN | others) == DRIVERS | others
    assert not any(name.startswith(PREFIXES) for name in OWN)
    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert passed_on_to_job() == passed_on() == {"NCCL_DEBUG": "INFO", "NCCL_IB_DISABLE": "1"}
    jobs: list[dict[str, Any]] = [
        {"runtime_env": {"env_vars": {"NCCL_DEBUG": "INFO"}}},
        {"runtime_env": {}},
        {"runtime_env": None},
        {},
    ]
    for job in jobs:
        monkeypatch.setenv(JOB_CONFIG, json.dumps(job))
        there = (job.get("runtime_env") or {}).get("env_vars", {})
        assert passed_on_to_job() == {name: value for name, value in passed_on().items() if name not in there}


def of_a_task(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment of a task that a driver with `environment` starts on the running Ray."""
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", DRIVER, address]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.usefixtures("_local_ray")
def test_a_task_on_a_cluster_has_them() -> None:
    """Ray itself would not pass them on: its processes have the environment in which it was started."""
    found = of_a_task(DRIVERS | {"HF_TOKEN": "hf_secret", "MY_NCCL_TOKEN": "secret"})
    assert DRIVERS.items() <= found.items()
    assert not {"HF_TOKEN", "MY_NCCL_TOKEN"} & found.keys()


@pytest.mark.usefixtures("_local_ray")
def test_a_driver_that_ray_job_submit_has_started() -> None:
    """Its variables are in the job already: Ray refuses to hear of them twice."""
    job = {"runtime_env": {"env_vars": {"NCCL_DEBUG": "INFO"}}, "metadata": {}}
    found = of_a_task(DRIVERS | {JOB_CONFIG: json.dumps(job)})
    assert DRIVERS.items() <= found.items()


@pytest.mark.usefixtures("_local_ray")
def test_a_worker_has_them_on_a_ray_that_was_connected_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (DRIVERS | {"HF_TOKEN": "hf_secret"}).items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "environment.json"

    def note_environment() -> None:  # inside, so that it travels whole
        file.write_text(json.dumps(dict(os.environ)))

    InterruptibleTrainer(
        note_environment,
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=str(tmp_path), name="run"),
    ).fit_or_abort()
    found = json.loads(file.read_text())
    assert DRIVERS.items() <= found.items()
    assert "HF_TOKEN" not in found


@pytest.mark.usefixtures("_local_ray")
def test_trials_and_their_workers_have_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (DRIVERS | {"HF_TOKEN": "hf_secret"}).items():
        monkeypatch.setenv(name, value)

    def trial(config: dict[str, Any]) -> None:
        (tmp_path / "trial.json").write_text(json.dumps(dict(os.environ)))
        worker = tmp_path / "worker.json"
        InterruptibleTrainer(
            lambda: worker.write_text(json.dumps(dict(os.environ))),
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(storage_path=str(tmp_path), name="run"),
        ).fit_or_abort()

    trials = tune.with_resources(trial_function(trial), {"CPU": 1})
    tune.Tuner(trials, run_config=tune.RunConfig(name="sweep", storage_path=str(tmp_path))).fit()
    for process in ("trial", "worker"):
        found = json.loads((tmp_path / f"{process}.json").read_text())
        assert DRIVERS.items() <= found.items()
        assert "HF_TOKEN" not in found
