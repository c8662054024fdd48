"""Memory that a process on a CPU has freed: kept for the next step, by the kernel's count of page faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
from processes import when, workers_called
from runs import Settings

from raycontrolnet import TrainConfig, fit
from raycontrolnet.cluster.cpus import SPINS
from raycontrolnet.training.host_memory import PARAMETERS, freed_memory_kept, variables_for_kept_memory
from raycontrolnet.training.status import read_status

WORK = """
import resource, sys, threading
import torch
from raycontrolnet.training.host_memory import freed_memory_kept

def work():
    with freed_memory_kept(on_cpu=sys.argv[1] == "kept"):
        tensor = torch.ones(20 * 2**20)  # 80 MiB: 20,480 pages
        for _ in range(20):
            tensor + 1
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            tensor + 1
        print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 20)

if sys.argv[2] == "thread":
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
else:
    work()
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc's malloc")


def faults(how: str, where: str, environment: dict[str, str]) -> int:
    command = [sys.executable, "-c", WORK, how, where]
    return int(subprocess.check_output(command, env={**os.environ, **environment}, text=True))


@glibc
def test_freed_memory_is_kept() -> None:
    """Also in the thread of a worker's loop, where the environment must have said so at the start."""
    assert faults("plain", "main", {}) > 20_000
    assert faults("kept", "main", {}) < 4_000
    assert faults("kept", "thread", {}) > 20_000, "the environment's variables are no longer needed"
    assert faults("kept", "thread", variables_for_kept_memory({})) < 4_000


@glibc
@pytest.mark.parametrize("name", PARAMETERS)
def test_what_the_user_has_set_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "77")
    assert variables_for_kept_memory() == {}
    with freed_memory_kept(on_cpu=True) as kept:
        assert not kept
    monkeypatch.setenv(name, str(PARAMETERS[name][1]))
    assert len(variables_for_kept_memory()) == len(PARAMETERS)


def test_not_on_a_gpu() -> None:
    with freed_memory_kept(on_cpu=False) as kept:
        assert not kept


@glibc
def test_a_run_tells(tiny_settings: Settings) -> None:
    done = fit(TrainConfig(**tiny_settings | {"max_train_steps": 1})).output_dir
    assert read_status(done)["freed_memory_kept"] is True


@pytest.mark.usefixtures("_local_ray")
def test_a_worker_on_ray_has_the_variables(tiny_settings: Settings) -> None:
    found: list[dict[str, str]] = []

    def look() -> None:
        found.append(workers_called("RayTrainWorker")[0].environ())

    with when(lambda: bool(workers_called("RayTrainWorker")), look):
        fit(TrainConfig(**tiny_settings | {"num_workers": "1", "max_train_steps": 1}))
    assert (variables_for_kept_memory({}) | SPINS).items() <= found[0].items()
