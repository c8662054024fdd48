"""GPU memory: a process that shares a GPU is kept to its share, and one that is out of memory names what helps."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from runs import Settings, run

from raycontrolnet import TrainConfig
from raycontrolnet.cluster.worker import gpu_share
from raycontrolnet.errors import RunError, out_of_memory
from raycontrolnet.model import performance, step
from raycontrolnet.model.performance import is_out_of_memory, memory_fraction, memory_share
from raycontrolnet.training import memory, state
from raycontrolnet.training.failures import failures_recorded, read_failure
from raycontrolnet.training.memory import memory_advice
from raycontrolnet.training.state import accelerator_for

GIB = 2**30
ON_CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.25 GiB is free"
    ". If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to "
    "avoid fragmentation.  See documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html)"
)
CUDA = torch.device("cuda", 0)


# --- the share ---


def test_a_share_leaves_room_for_cuda_itself() -> None:
    """Torch counts what its allocator has; CUDA's context comes on top, in every process that shares the GPU."""
    assert memory_fraction(0.5, 80 * GIB) == pytest.approx(0.5 - 0.5 / 80)
    assert 2 * (80 * GIB * memory_fraction(0.5, 80 * GIB) + performance.CONTEXT_BYTES) == 80 * GIB
    assert memory_fraction(0.25, 2 * GIB) == 0.125, "of a small one half of the share"


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, torch.device]]:
    """Return what CUDA is told: (fraction, device); of a GPU with 80 GiB."""
    told: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda part, device: told.append((round(part, 5), device))
    )
    return told


def test_trials_of_one_process(fractions: list[tuple[float, torch.device]]) -> None:
    """Each has its own; nothing is left for one with a whole GPU, also after a failure."""
    failing = ExitStack()
    failing.enter_context(memory_share(CUDA, 0.5))
    assert fractions[0] == (0.49375, CUDA)
    failing.__exit__(RuntimeError, RuntimeError(), None)
    with memory_share(CUDA, 1.0):
        assert fractions[1:] == [(1.0, CUDA)]
    with memory_share(CUDA, 0.25):
        assert fractions[2] == (0.24375, CUDA)
    with memory_share(torch.device("cpu"), 0.25):
        assert fractions[3:] == [(1.0, CUDA)]


def test_a_run_is_kept_to_its_share(
    fractions: list[tuple[float, torch.device]], tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it: the fraction is set before the models are on the device, and until the end."""
    monkeypatch.setattr(state, "gpu_share", lambda: 0.5)
    monkeypatch.setattr(state, "memory_share", lambda _, share: memory_share(CUDA, share))
    with accelerator_for(TrainConfig(**tiny_settings), use_gpu=False):
        assert [fraction for fraction, _ in fractions] == [0.49375]
    assert [fraction for fraction, _ in fractions[1:]] == [1.0]


@pytest.mark.usefixtures("_local_ray")
def test_the_share_that_ray_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_share() == 1.0, "a driver"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "ray", None)
        assert gpu_share() == 1.0, "nor need Ray be installed, as for tests/gpu/kit.py"

    def share() -> float:
        from raycontrolnet.cluster.worker import gpu_share

        return gpu_share()

    assert ray.get(ray.remote(num_cpus=0.5)(share).remote()) == 1.0
    for given, expected in (
        ({"GPU": 0.4}, 0.4),
        ({"GPU": 1.0}, 1.0),
        ({"GPU": 2.0}, 1.0),
        ({}, 1.0),
        ({"GPU": 0}, 1.0),
    ):
        context = SimpleNamespace(get_assigned_resources=lambda given=given: given)
        monkeypatch.setattr(ray, "get_runtime_context", lambda context=context: context)
        assert gpu_share() == expected


SHARED = """
import json, os, sys
import ray, torch
from ray import tune
from types import SimpleNamespace

ray.init(address="local", num_cpus=3, num_gpus=1, include_dashboard=False, log_to_driver=False)

def trial(config):
    from raycontrolnet.cluster.worker import gpu_share
    from raycontrolnet.model.performance import memory_share

    told = []
    torch.cuda.get_device_properties = lambda _: SimpleNamespace(total_memory=80 * 2**30)
    torch.cuda.set_per_process_memory_fraction = lambda fraction, _: told.append(fraction)
    with memory_share(torch.device("cuda", 0), gpu_share()):
        inside = list(told)
    tune.report({"inside": inside, "after": told[-1:], "pid": os.getpid()})

def ran(gpus):
    resources = tune.PlacementGroupFactory([{"CPU": 1, "GPU": gpus}])
    config = tune.TuneConfig(num_samples=3, max_concurrent_trials=1, reuse_actors=True)
    run_config = tune.RunConfig(storage_path=sys.argv[1], verbose=0)
    results = tune.Tuner(tune.with_resources(trial, resources), tune_config=config, run_config=run_config).fit()
    return [{name: each.metrics[name] for name in ("inside", "after", "pid")} for each in results]

print(json.dumps([ran(0.5), ran(1.0)]))
"""


@pytest.mark.slow
def test_trials_on_a_ray_that_says_it_has_a_gpu(tmp_path: Path) -> None:
    """Processes of Tune with half a GPU, which CUDA would be told of; trials follow each other in one process."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", SHARED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    halves, wholes = json.loads(done.stdout.splitlines()[-1])
    assert len({each["pid"] for each in halves}) < 3 == len(halves)
    assert [each["inside"] for each in halves] == [[pytest.approx(0.49375)]] * 3
    assert [each["after"] for each in halves] == [[1.0]] * 3
    assert [each["inside"] for each in wholes] == [[]] * 3


# --- out of memory ---


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError(ON_CUDA), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"), True),
        (RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), False),
        (MemoryError("CUDA out of memory"), False),
        (ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory."), False),
    ],
)  # fmt: skip
def test_which_errors_tell_of_a_full_gpu(error: BaseException, expected: bool, tmp_path: Path) -> None:
    """Others, and the host's memory, keep their own words, and are not recorded: another try may do."""
    assert is_out_of_memory(error) == expected
    with pytest.raises(RunError if expected else type(error)), failures_recorded(tmp_path, lambda: "Do this"):
        raise error
    failure = read_failure(tmp_path)
    assert str(failure).endswith(". Do this.") if expected else failure is None


def test_what_torch_says_beside_it_is_left_out() -> None:
    said = str(out_of_memory(torch.OutOfMemoryError(ON_CUDA), "Do this"))
    assert said == (
        "Out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
        "which 1.25 GiB is free. Do this."
    )


def advice(settings: Settings, **changed: Any) -> str:
    how: dict[str, Any] = {"cached": False, "num_workers": 1, "share": 1.0, "bf16": True}
    given = {name: changed.pop(name, value) for name, value in how.items()}
    return memory_advice(TrainConfig(**settings | changed), **given)


END = "; `raycontrolnet check` with the run's flags predicts how much"


@pytest.mark.parametrize("installed", [True, False])
def test_a_package_that_is_needed_is_named(
    tiny_settings: Settings, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if installed else None)
    note = "" if installed else " (bitsandbytes is not installed; run pip install 'raycontrolnet[8bit]')"
    assert f"--use_8bit_adam{note}, --cache_latents on" in advice(tiny_settings)


def test_the_flags_that_are_not_in_use(tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "missing_package", lambda _: None)
    assert advice(tiny_settings) == (
        "Less is needed with --gradient_checkpointing, --train_batch_size 2 --gradient_accumulation_steps 2 (as many "
        "samples an update), --mixed_precision bf16, --use_8bit_adam, --cache_latents on or --set_grads_to_none" + END
    )
    every: dict[str, Any] = {
        "gradient_checkpointing": True, "train_batch_size": 1, "mixed_precision": "bf16", "use_8bit_adam": True,
        "cached": True, "set_grads_to_none": True, "cuda_graphs": "off",
    }  # fmt: skip
    assert advice(tiny_settings, **every) == (
        "No flag is left that needs less: take a smaller --resolution, or a GPU with more memory"
    )
    for name, other, flag in (
        ("gradient_checkpointing", False, "--gradient_checkpointing"),
        ("train_batch_size", 7, "--train_batch_size 1 --gradient_accumulation_steps 7 (as many samples an update)"),
        ("mixed_precision", "no", "--mixed_precision bf16"),
        ("mixed_precision", None, "--mixed_precision bf16"),
        ("use_8bit_adam", False, "--use_8bit_adam"),
        ("cached", False, "--cache_latents on"),
        ("set_grads_to_none", False, "--set_grads_to_none"),
        ("cuda_graphs", "auto", "--cuda_graphs off"),  # which hold the gradients
        ("share", 0.5, "more than 0.5 of a GPU (--gpus_per_trial)"),
    ):
        assert advice(tiny_settings, **every | {name: other}) == f"Less is needed with {flag}{END}"
    both = every | {"set_grads_to_none": False, "cuda_graphs": "auto"}
    assert advice(tiny_settings, **both) == f"Less is needed with --set_grads_to_none --cuda_graphs off{END}"
    accumulated = every | {"cuda_graphs": "auto", "gradient_accumulation_steps": 2}
    assert advice(tiny_settings, **accumulated).startswith("No flag is left"), "gradients stay with and without graphs"
    # An update of the averages needs a copy, beside the activations that graphs hold.
    averaged = advice(tiny_settings, **accumulated, use_ema=True)
    assert averaged == f"Less is needed with --cuda_graphs off{END}"
    assert advice(tiny_settings, **accumulated | {"num_workers": 2}, use_ema=True).startswith("No flag is left")
    several = accumulated | {"num_workers": 2, "cuda_graphs": "on", "use_ema": True}
    assert advice(tiny_settings, **several) == f"Less is needed with --cuda_graphs off{END}"
    assert "--mixed_precision fp16" in advice(tiny_settings, bf16=False)
    assert "--train_batch_size 6 --gradient_accumulation_steps 6 (" in advice(
        tiny_settings, train_batch_size=12, gradient_accumulation_steps=3
    )
    for keeps_gradients in ({"num_workers": 2}, {"gradient_accumulation_steps": 2}):
        assert "--set_grads_to_none" not in advice(tiny_settings, **keeps_gradients)


def test_a_run_that_is_out_of_memory(tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One paragraph, of which a trial's record has all; and what stands."""
    real, done = step.train_step, []

    def train_step(*given: Any) -> Any:
        done.append(given)
        if len(done) == 4:
            raise torch.OutOfMemoryError(ON_CUDA)
        return real(*given)

    monkeypatch.setattr("raycontrolnet.train_controlnet.train_step", train_step)
    monkeypatch.setattr(memory, "missing_package", lambda _: None)
    out = tmp_path / "out"
    with pytest.raises(RunError) as error:
        run(tiny_settings, out, gradient_checkpointing=True, mixed_precision="bf16")
    first, second = str(error.value).split("\n")
    assert first == (
        "Out of GPU memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
        "which 1.25 GiB is free. Less is needed with --train_batch_size 2 --gradient_accumulation_steps 2 (as many "
        f"samples an update), --use_8bit_adam, --cache_latents on or --set_grads_to_none --cuda_graphs off{END}."
    )
    assert second.startswith("The checkpoint of update 2 stands: go on with --resume_from_checkpoint latest")
    assert json.loads((out / "run.json").read_text())["cause"].startswith("Out of GPU memory: ")
