"""The precision of runs that name none: bf16 on GPUs that have it, what a checkpoint was trained in, fp32 on CPUs."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
import yaml
from ray._private.thirdparty import pynvml
from runs import Run, Settings, losses, train

from raycontrolnet import SweepConfig, TrainConfig
from raycontrolnet.cluster import gpus, session
from raycontrolnet.cluster.resources import WorkerResources
from raycontrolnet.config.check_config import CheckConfig
from raycontrolnet.errors import RunError
from raycontrolnet.launch import fit as launch
from raycontrolnet.launch import precision
from raycontrolnet.launch.checked_device import Device, in_precision_of_device
from raycontrolnet.launch.precision import in_words, resolve, trained_in, workers_have_bf16
from raycontrolnet.model import performance
from raycontrolnet.predict.devices import peak_of
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.tune import plan as plans
from raycontrolnet.tune.lease import SweepLease
from raycontrolnet.tune.plan import SweepPlan, plan_sweep
from raycontrolnet.tune.records import TrialRecord

DEFAULT = "bf16 (the default on GPUs that have it; --mixed_precision no trains in fp32)"


def never() -> bool:
    raise AssertionError("no GPU is asked")


@pytest.mark.parametrize(
    ("given", "trained", "use_gpu", "has_bf16", "expected"),
    [
        (None, None, True, True, "bf16"),
        (None, None, True, False, "no"),
        (None, None, False, None, None),
        ("no", None, True, None, "no"),
        ("fp16", "bf16", True, None, "fp16"),
        ("bf16", None, False, None, "bf16"),
        (None, "no", True, None, "no"),
        (None, "fp16", True, None, "fp16"),
        (None, "bf16", True, None, "bf16"),
        (None, "bf16", False, None, "bf16"),
        (None, "fp16", False, None, None),
        (None, "no", False, None, None),
    ],
)
def test_which(
    given: str | None, trained: str | None, use_gpu: bool, has_bf16: bool | None, expected: str | None
) -> None:
    ask = never if has_bf16 is None else lambda: has_bf16
    found, reason = resolve(given, trained, use_gpu=use_gpu, has_bf16=ask, by="checkpoint-2")
    assert found == expected
    assert bool(reason) == (given is None and expected is not None)
    if reason and trained:
        assert in_words("no", reason) == "fp32 (as checkpoint-2; --mixed_precision changes it)"


def test_what_a_checkpoint_says() -> None:
    def start(**manifest: Any) -> Any:
        return SimpleNamespace(manifest=manifest)

    assert trained_in(None) is None
    assert trained_in(start()) is None
    assert trained_in(start(settings={"mixed_precision": None})) == "no"
    assert trained_in(start(settings={"mixed_precision": "bf16"})) == "bf16"


# --- a run ---


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Let runs in this process believe that they have a GPU, with bf16 or not; they compute on the CPU all the same."""

    def believe(bf16: bool) -> None:
        monkeypatch.setattr(launch, "check_device", lambda *_, **__: True)
        monkeypatch.setattr(launch, "has_bf16", lambda: bf16)

    return believe


def settings_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((out / "config.yaml").read_text())
    return found


def changed(settings: Settings, out: Path, **others: Any) -> Run:
    return train(settings | {"output_dir": str(out)} | others)


def test_the_default_reaches_the_step_and_all_that_is_written(
    tiny_settings: Settings, tmp_path: Path, on_a_gpu: Callable[[bool], None]
) -> None:
    plain = changed(tiny_settings, tmp_path / "plain")
    half = changed(tiny_settings, tmp_path / "half", mixed_precision="bf16")
    on_a_gpu(True)
    out, _, shown = changed(tiny_settings, tmp_path / "out", use_gpu=None)
    assert losses(out) == losses(half.folder)
    assert losses(out) != losses(plain.folder)
    assert shown.splitlines()[0].endswith(f", seed 0, {DEFAULT}")
    assert settings_of(out)["mixed_precision"] == "bf16"
    assert json.loads((out / "run.json").read_text())["mixed_precision"] == "bf16"
    for checkpoint in checkpoints.all_checkpoints(out):
        assert checkpoint.manifest["settings"]["mixed_precision"] == "bf16"
    assert '`mixed_precision`: `"bf16"`' in (out / "README.md").read_text()
    for run, said in ((plain, "seed 0"), (half, "seed 0, bf16")):
        assert run.shown.splitlines()[0].endswith(said)
    assert settings_of(plain.folder)["mixed_precision"] is None
    assert json.loads((plain.folder / "run.json").read_text())["mixed_precision"] == "no"


def test_no_turns_it_off_and_old_gpus_do_without(
    tiny_settings: Settings, tmp_path: Path, on_a_gpu: Callable[[bool], None]
) -> None:
    plain = changed(tiny_settings, tmp_path / "plain")
    for name, bf16, given in (("no", True, "no"), ("old", False, None)):
        on_a_gpu(bf16)
        run = changed(tiny_settings, tmp_path / name, mixed_precision=given)
        assert losses(run.folder) == losses(plain.folder)
        assert settings_of(run.folder)["mixed_precision"] == "no"
        reason = "" if given else " (not all of these GPUs have bf16; --mixed_precision fp16 needs less memory)"
        assert run.shown.splitlines()[0].endswith(f", seed 0, fp32{reason}")


def test_images_are_drawn_during_a_run_in_bf16(validated_settings: Settings, tmp_path: Path) -> None:
    """A CPU's group norm takes no other dtype than its weights'; once, no image came before the run's end."""
    out = train(validated_settings | {"mixed_precision": "bf16", "output_dir": str(tmp_path / "out")}).folder
    assert "no validation images" not in (out / "run.log").read_text()
    drawn = {each.parent.name for each in (out / "validation").glob("*/*-image-*.png")}
    assert drawn == {"step-000002", "step-000004"}


@pytest.mark.parametrize("trained", [None, "bf16"])
def test_a_run_goes_on_as_it_began(
    tiny_settings: Settings, tmp_path: Path, on_a_gpu: Callable[[bool], None], trained: str | None
) -> None:
    """Runs of versions before this default were trained in fp32 on GPUs."""
    whole = changed(tiny_settings, tmp_path / "whole", mixed_precision=trained)
    on_a_gpu(True)
    start = {"resume_from_checkpoint": str(whole.folder / "checkpoint-2")}
    resumed = changed(tiny_settings, tmp_path / "resumed", **start)
    assert losses(resumed.folder) == losses(whole.folder)[2:]
    words = "fp32" if trained is None else trained
    assert f", {words} (as checkpoint-2; --mixed_precision changes it)" in resumed.shown.splitlines()[0]
    other = changed(tiny_settings, tmp_path / "other", mixed_precision="no" if trained else "bf16", **start)
    assert losses(other.folder) != losses(whole.folder)[2:]


# --- the GPUs of a cluster ---


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return nvml(*major): GPUs of these compute capabilities are in this machine, as NVIDIA's library has it."""

    def install(*major: int) -> None:
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(major))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda handle: (major[handle], 6))

    return install


def workers(*, use_gpu: bool = True, **options: Any) -> WorkerResources:
    given: dict[str, Any] = {"num_workers": (1, 1), "cpus_per_worker": 1.0, "accelerator_type": None}
    return WorkerResources(use_gpu=use_gpu, **given | options)


def test_gpus_of_a_ray_of_our_own(nvml: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_own", True)
    if not torch.cuda.is_available():
        assert gpus.gpus_have_bf16(workers()) is None, "there is no NVML"
    for major, expected in (((8, 9), True), ((7,), False), ((9, 7), False), ((), None)):
        nvml(*major)
        assert gpus.gpus_have_bf16(workers()) is expected


@pytest.mark.parametrize(
    ("answers", "expected"),
    [([True, True], True), ([True, False], False), ([True, None], None), ([], None)],
)
def test_gpus_of_a_cluster(answers: list[bool | None], expected: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def on_each_node(look: Any, *args: Any, of: Callable[[Any], bool]) -> list[tuple[str, Any]]:
        asked.append([of(node) for node in ({"CPU": 8, "GPU": 1}, {"CPU": 8})])
        return [("node", answer) for answer in answers]

    monkeypatch.setattr(gpus, "on_each_node", on_each_node)
    assert gpus.gpus_have_bf16(workers()) is expected
    assert asked == [[True, False]], "nodes without GPUs are not asked"


@pytest.mark.usefixtures("_local_ray")
def test_a_gpu_is_asked_where_no_node_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a task with a worker's resources, which waits for a node as the worker would; no longer than it may."""
    stream, cancelled, cancel = io.StringIO(), [], ray.cancel

    def noted(*args: Any, **how: Any) -> None:
        cancelled.append(args)
        cancel(*args, **how)

    monkeypatch.setattr(ray, "cancel", noted)
    assert workers_have_bf16(workers(use_gpu=False), None, stream) is torch.cuda.is_available()
    assert not cancelled, "Ray may end the process of who cancels a task that is done"
    monkeypatch.setattr(precision, "gpus_have_bf16", lambda _: None)
    start = time.monotonic()
    problem = r"The workers have not started within --wait_timeout_s=1: 1 node up with .* the run needs 1 worker of 1 "
    with pytest.raises(RunError, match=problem):
        workers_have_bf16(workers(accelerator_type="T4"), 1.0, stream)
    assert time.monotonic() - start < 60
    assert cancelled, "it would wait in Ray's queue for ever"
    monkeypatch.setattr(precision, "gpus_have_bf16", lambda _: True)
    monkeypatch.setattr(ray, "get", never)
    assert workers_have_bf16(workers(), None, stream)


def test_the_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not performance.has_bf16()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for major, expected in ((7, False), (8, True), (9, True)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, major=major: SimpleNamespace(major=major))
        assert performance.has_bf16() is expected


# --- sweeps ---


def planned(settings: Settings, **how: Any) -> SweepPlan:
    space = how.pop("space", {"learning_rate": {"choice": [1e-3, 2e-3]}})
    sweep: dict[str, Any] = {"num_samples": 2, "scheduler": "none", "space": space}
    return plan_sweep(SweepConfig(train=TrainConfig(**settings), **sweep | how), io.StringIO())


def shared_of(plan: SweepPlan, *, use_gpu: bool, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    monkeypatch.setattr(plans, "ensure_latents", lambda run, *_: run)
    monkeypatch.setattr(plans, "workers_have_bf16", lambda *_: bf16)
    slots: Any = SimpleNamespace(use_gpu=use_gpu, cpus_per_worker=1.0)
    stream, unused = io.StringIO(), workers(use_gpu=use_gpu)
    return plans.share(plan, slots, SweepLease(plan.folder, "id"), unused, stream), stream.getvalue()


def test_trials(sweep_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(sweep_settings)
    record = TrialRecord(0, {"learning_rate": 1e-3})
    for use_gpu, bf16, expected in ((True, True, "bf16"), (True, False, "no"), (False, True, None)):
        shared, said = shared_of(plan, use_gpu=use_gpu, bf16=bf16, monkeypatch=monkeypatch)
        assert shared.run_of(record).config.mixed_precision == expected
        assert plan.config_of(record, shared.mixed_precision).mixed_precision == expected, "of best/"
        assert said.startswith(
            f"sweep: trials train in {DEFAULT}" if expected == "bf16" else "sweep" if use_gpu else ""
        )
        other = TrialRecord(1, {"mixed_precision": "fp16"})
        assert shared.run_of(other).config.mixed_precision == "fp16"
    begun = replace(plan, records=[record])  # by a version that did not note it
    shared, said = shared_of(begun, use_gpu=True, bf16=True, monkeypatch=monkeypatch)
    assert shared.run_of(record).config.mixed_precision == "no"
    assert said == "sweep: trials train in fp32 (as the sweep has begun; --mixed_precision changes it)\n"
    begun = replace(plan, records=[record], mixed_precision="bf16")
    assert shared_of(begun, use_gpu=True, bf16=False, monkeypatch=monkeypatch)[0].mixed_precision == "bf16"
    assert begun.facts()["mixed_precision"] == "bf16"


def test_a_space_that_names_every_precision(sweep_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(sweep_settings, space={"mixed_precision": {"choice": ["no", "bf16"]}})
    shared, said = shared_of(plan, use_gpu=True, bf16=True, monkeypatch=monkeypatch)
    assert (shared.mixed_precision, said) == (None, "")


# --- raycontrolnet check ---


def test_check_agrees(tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(given: Settings, **device: Any) -> str | None:
        config = CheckConfig(train=TrainConfig(**tiny_settings | {"use_gpu": None} | given), **device)
        return in_precision_of_device(config).mixed_precision

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found({}) is None
    assert found({}, device_memory=24.0) == "bf16"
    assert found({}, device_tflops=312.0) == "bf16"
    assert found({"mixed_precision": "no"}, device_memory=24.0) == "no"
    assert found({"use_gpu": False}, device_memory=24.0) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name, major, expected in (("Tesla T4", 7, "no"), ("NVIDIA A100-SXM4-40GB", 8, "bf16")):
        here = SimpleNamespace(name=name, major=major, total_memory=2**34)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, here=here: here)
        assert found({}) == expected
        assert found({}, device_memory=80.0) == "bf16", "of another device"
        config = CheckConfig(train=TrainConfig(**tiny_settings | {"use_gpu": None}))
        config = replace(config, train=in_precision_of_device(config))
        peak = peak_of(name)
        assert peak
        assert Device.of(config).tflops == (peak.half if expected == "bf16" else peak.fp32)
