"""The step never waits for a device: it runs on the device `meta`, under a mode that fails at whatever would wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from full_size import TINY, write_configurations
from random_models import TextLengths, built
from reference import CPU, fake_rows
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raycontrolnet import TrainConfig, fit, train_controlnet
from raycontrolnet.config.objective_settings import ObjectiveConfig
from raycontrolnet.model import batch as batch_module
from raycontrolnet.model.batch import Batch, Draws, draw, latent_shape, make_batch, to_device
from raycontrolnet.model.components import Components
from raycontrolnet.model.families.registry import family_of
from raycontrolnet.model.files import local_files
from raycontrolnet.model.optimizers import optimizer_class
from raycontrolnet.model.step import TrainState, controlnet_loss, train_step
from raycontrolnet.training import figures, metrics
from raycontrolnet.training.schedule import Schedule
from raycontrolnet.training.state import accelerator_for, state_of

META = torch.device("meta")
WAITS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"}
"""Operators whose result the host must know."""
COPIES = {"aten::_to_copy", "aten::copy_"}


class NoWaiting(TorchDispatchMode):
    """Fails at a value that is read, and at a copy between devices that is not told to go on without waiting."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options, name = kwargs or {}, func.name().partition(".")[0]
        tensors = [each for each in tree_leaves((args, options)) if isinstance(each, torch.Tensor)]
        indices = args[1] if name in ("aten::index", "aten::index_put_") else ()
        by_mask = any(each is not None and each.dtype == torch.bool for each in indices)
        if any(each.device == META for each in tensors) and (name in WAITS or by_mask):
            raise AssertionError(f"{name} waits for the device")
        # Numbers of the host are arguments of kernels, but where they are copied.
        devices = {each.device.type for each in tensors if each.dim() or name in COPIES}
        if target := options.get("device"):
            devices.add(torch.device(target).type)
        goes_on = options.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
        if {"meta", "cpu"} <= devices and not goes_on:
            raise AssertionError(f"{name} copies between devices, and waits")
        return func(*args, **options)


class NoTensorsOfLists(TorchFunctionMode):
    """Fails where a list becomes a tensor on the device at once: from memory that is not pinned, which waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == META:
            raise AssertionError("a list is copied to the device, and waits")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    with NoTensorsOfLists(), NoWaiting():
        yield


XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 112,
      "cross_attention_dim": 128}  # fmt: skip
BASES = {
    "epsilon": TINY,
    "v_prediction": TINY | {"scheduler": TINY["scheduler"] | {"prediction_type": "v_prediction"}},
    "xl": TINY | {"unet": TINY["unet"] | XL, "text_encoder_2": TINY["text_encoder"]},
}


def on_meta(base: dict[str, dict[str, Any]], folder: Path, dtype: torch.dtype) -> Components:
    files = local_files(write_configurations(base, folder / "base"))
    family = family_of(files.read_json("unet/config.json"))
    assert family
    config = TrainConfig(pretrained_model_name_or_path="none", train_data_dir=".")
    components = built(family, files, config, dtype=dtype)
    for module in (*components.frozen(), components.controlnet):
        module.to(META)
    family.move_tables(components.noise_scheduler, META)
    return components


def inputs(components: Components, *, cached: bool) -> tuple[Batch, Draws]:
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8, device=META)
    tokens = tuple(torch.zeros(2, 77, dtype=torch.int64, device=META) for _ in components.text_encoders)
    sizes = torch.zeros(2, 6, device=META) if components.family.has_size_conditions else None
    noise = torch.zeros(2, *latent_shape(components, 32), device=META)
    posterior = torch.stack([noise, noise], dim=1).half() if cached else None
    batch = Batch(None if cached else images, images, tokens, sizes, posterior)
    return batch, Draws(noise, noise, torch.zeros(2, dtype=torch.int64, device=META))


@pytest.mark.parametrize("objective", [{}, {"snr_gamma": 5.0, "loss": "huber", "input_perturbation": 0.1}])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward(
    base: str, cached: bool, dtype: torch.dtype, objective: dict[str, Any], tmp_path: Path
) -> None:
    components = on_meta(BASES[base], tmp_path, dtype)
    if dtype != torch.float32:  # autocast, of which `meta` has none
        components.controlnet.to(dtype)
    batch, draws = inputs(components, cached=cached)
    draws = draws._replace(input_noise=draws.noise) if objective else draws
    with no_waiting():
        loss = controlnet_loss(components, components.controlnet, batch, draws, ObjectiveConfig(**objective))
        loss.mean().backward()
    assert all(weight.grad is not None for weight in components.controlnet.parameters())


@contextmanager
def meta_state(folder: Path, **changes: Any) -> Iterator[TrainState]:
    """Give a state on `meta`, with an optimizer that is fused as on a GPU, which does nothing: `meta` has none."""
    given: dict[str, Any] = {"pretrained_model_name_or_path": "none", "train_data_dir": ".", "lr_scheduler": "cosine"}
    config = TrainConfig(**given | changes)
    components = on_meta(TINY, folder, torch.float32)
    with accelerator_for(config, use_gpu=False) as accelerator, pytest.MonkeyPatch.context() as patch:
        patch.setitem(PartialState._shared_state, "device", META)
        AcceleratorState()  # takes it over
        found = optimizer_class(config.optimizer)
        patch.setattr(found, "__init__", as_fused(found.__init__))
        patch.setattr(found, "step", lambda self, closure=None: None)
        yield state_of(components, config, Schedule.of(config, 100, 1), accelerator)


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam", "SGD", "Adagrad"])
def test_a_whole_update(optimizer: str, tmp_path: Path) -> None:
    """Clipping, the optimizer and the schedule too."""
    with meta_state(tmp_path, optimizer=f"torch.optim.{optimizer}") as state:
        batch, draws = inputs(state.components, cached=True)
        with no_waiting():
            results = [train_step(state, batch, draws) for _ in range(2)]
        assert state.step == 2
        assert {result.loss.device.type for result in results} == {"meta"}


def as_fused(original: Any) -> Any:
    """Return an optimizer's constructor for weights on `meta`, on which it would refuse to be fused."""

    def init(self: Any, parameters: Any, *, fused: bool = False, **options: Any) -> None:
        original(self, parameters, fused=False, **options)
        self._step_supports_amp_scaling = fused

    return init


def to_meta(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy as `to_device` copies to a GPU, for which it pins."""
    return tensor.to(device, non_blocking=True)


def test_the_inputs_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All copies of `make_batch` and `draw` are made by `to_device`."""
    monkeypatch.setattr(batch_module, "to_device", to_meta)
    components = replace(on_meta(BASES["xl"], tmp_path, torch.float32), tokenizers=(TextLengths(),))
    objective = ObjectiveConfig(noise_offset=0.1, input_perturbation=0.1)
    pixels, cached = fake_rows(0, 1), [replace(row, image=None, posterior=POSTERIOR) for row in fake_rows(0, 1)]
    with no_waiting():
        made = [make_batch(rows, components, META) for rows in (pixels, cached)]
        draws = draw(0, [0, 1], (4, 16, 16), components.draw_timestep, META, objective=objective)
    tensors = [each for each in tree_leaves((made, draws)) if each is not None]
    assert len(tensors) == 2 * 4 + 4
    assert {each.device for each in tensors} == {META}


POSTERIOR = np.zeros((2, 4, 16, 16), np.float16)


def test_copies_to_a_gpu_are_pinned_and_go_on() -> None:
    calls = []

    class Calls(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append((func.__name__, args[1:], kwargs))
            return args[0]

    device, tensor = torch.device("cuda"), torch.zeros(2)
    with Calls():
        to_device(tensor, device)
    assert [(name, given, options or {}) for name, given, options in calls] == [
        ("pin_memory", (), {}),
        ("to", (device,), {"non_blocking": True}),
    ]


def test_a_worker(tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's updates wait for nothing, and it reads notices of the update before the last, while the last runs."""
    made: list[Any] = []
    reads: list[tuple[int, int]] = []

    class Notices:
        def __init__(self, value: torch.Tensor) -> None:
            self.number = len(made)
            made.append(value)

        def read(self) -> list[float]:
            reads.append((self.number, len(made) - 1))
            return [0.0, 0.0]

    def run(worker: Any, batches: Any, start: Any) -> dict[str, Any]:
        given = iter([inputs(worker.state.components, cached=True)] * 6)
        with closing(worker.metrics_log), no_waiting():
            assert worker.train(given, None)
        assert len(worker.pending._pending) == 3, "a second is not over"
        return {"step": worker.state.step, "samples": worker.state.samples, "loss": 0.0, "timings": {}}

    for module in (figures, train_controlnet):
        monkeypatch.setattr(module, "OnItsWay", Notices)
    clock = SimpleNamespace(monotonic=lambda: 0.0, perf_counter=time.perf_counter)
    monkeypatch.setattr(metrics, "time", clock)
    monkeypatch.setattr(figures, "to_device", to_meta)
    monkeypatch.setattr(train_controlnet.Worker, "run", run)
    monkeypatch.setattr(train_controlnet.Worker, "validate_and_save", lambda *given: None)
    with meta_state(tmp_path / "model", gradient_accumulation_steps=2) as state:
        monkeypatch.setattr(train_controlnet, "build_state", lambda *given, **how: state)
        monkeypatch.setattr(train_controlnet, "accelerator_for", lambda *given, **how: nullcontext(state.accelerator))
        settings = tiny_settings | {"output_dir": str(tmp_path / "out"), "num_workers": 0, "max_train_steps": 3}
        fit(TrainConfig(**settings | {"gradient_accumulation_steps": 2, "checkpointing_steps": 100}))
    assert reads == [(0, 1), (1, 2), (2, 3)]


class Figure:
    """A number on a device, which notes that it was read."""

    def __init__(self, value: float) -> None:
        self.value, self.is_read = value, False

    def __float__(self) -> float:
        self.is_read = True
        return self.value


def test_figures_are_read_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now[0]))
    read: list[Figure] = []
    pending = metrics.PendingMetrics(train_controlnet.GPU_METRICS_INTERVAL_S, samples_per_update=8)

    def update(at: float, *, force: bool = False) -> list[tuple[Any, ...]]:
        now[0] = at
        read.extend([Figure(float(len(read))), Figure(0.5)])
        given: Any = read[-2:]
        pending.add(metrics.UpdateMetrics(1, given[0], 0.1, given[1], 8, 1000.0, at))
        return [(each.loss, each.grad_norm, each.images_per_second) for each in pending.ready(force=force)]

    assert update(100.3) == update(100.9) == []
    assert not any(each.is_read for each in read)
    assert update(101.5) == [(0, 0.5, 16), (2, 0.5, 16), (4, 0.5, 16)], "24 samples in 1.5 s"
    assert update(102.0) == []
    assert update(102.1, force=True) == [(6, 0.5, pytest.approx(16 / 0.6)), (8, 0.5, pytest.approx(16 / 0.6))]
    now[0] = 200.0
    pending.restart_clock()  # after a checkpoint
    assert update(200.5) == []
    assert update(201.0) == [(10, 0.5, 16), (12, 0.5, 16)]
    pending = metrics.PendingMetrics(0.0, samples_per_update=8)
    assert update(300.0) == [(14, 0.5, 1000)], "on a CPU each with its own speed"


@pytest.mark.parametrize(
    ("waits", "words"),
    [
        (lambda on, _: on.sum().item(), "_local_scalar_dense waits"),
        (lambda on, host: host.to(META), "_to_copy copies between devices"),
        (lambda on, host: on.copy_(host), "copy_ copies between devices"),
        (lambda on, host: host[0].to(META), "_to_copy copies between devices"),
        (lambda on, host: on[0].copy_(host[0]), "copy_ copies between devices"),
        (lambda on, host: on[on > 0], "index waits"),
        (lambda on, host: on.__setitem__(on > 0, on[:1]), "index_put_ waits"),
        (lambda on, host: torch.tensor([1.0, 2.0], device=META), "a list is copied"),
        (lambda on, host: on[host.long()], "index copies between devices"),
    ],
)
def test_the_mode_finds(waits: Any, words: str) -> None:
    on, host = torch.zeros(3, device=META), torch.zeros(3, device=CPU)
    with no_waiting(), pytest.raises(AssertionError, match=words):
        waits(on, host)


def test_the_mode_lets_others_pass() -> None:
    on, host = torch.zeros(3, device=META), torch.zeros(3, device=CPU)
    with no_waiting():
        for each in (host, host[0]):
            each.to(META, non_blocking=True)
        on.copy_(host, non_blocking=True)
        on[0].copy_(host[0], non_blocking=True)
        on.mul_(host[0])
