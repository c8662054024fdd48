"""Memory layouts and kernels: they change the speed alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import fake_rows, save_state, steps, training

from raycontrolnet import TrainConfig
from raycontrolnet.launch.fit import fit
from raycontrolnet.model.optim import build_optimizer
from raycontrolnet.model.performance import attention_kernels, fastest_convolutions
from raycontrolnet.model.step import TrainState
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.storage.checkpoint import Checkpoint
from raycontrolnet.training import state as states
from raycontrolnet.training.schedule import Schedule
from raycontrolnet.training.state import accelerator_for, build_state

CHANNELS_LAST = {"memory_format": torch.channels_last}
DEFAULT = {"memory_format": torch.contiguous_format}


@pytest.fixture(params=[(DEFAULT, CHANNELS_LAST), (CHANNELS_LAST, DEFAULT)], ids=["to channels last", "from it"])
def layouts(request: pytest.FixtureRequest) -> Any:
    """Return the layout of a ControlNet's weights when a checkpoint is written, and that when it is read."""
    return request.param


def layout_of(state: TrainState, moment: str | None = None) -> set[bool]:
    """Return, of all kernels of 3 x 3, whether they, or their moments, are channels last."""
    found = [
        each if moment is None else state.optimizer.state[each][moment]
        for each in state.components.controlnet.parameters()
        if each.dim() == 4 and each.shape[-1] > 1 < each.shape[1]
    ]
    assert len(found) > 10
    return {each.is_contiguous(memory_format=torch.channels_last) for each in found}


@pytest.fixture
def written(tiny_settings: dict[str, Any], tmp_path: Path, layouts: Any, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    laid_out(monkeypatch, layouts[0])
    with training(tiny_settings) as state:
        steps(state, fake_rows(0, 1))
        assert layout_of(state) == layout_of(state, "exp_avg") == {layouts[0] is CHANNELS_LAST}
        how: dict[str, Any] = {"seed": 0, "run_id": "a run", "facts": {}, "former": []}
        return checkpoints.write(tmp_path, step=1, samples=2, save=lambda folder: save_state(state, folder), **how)


def laid_out(monkeypatch: pytest.MonkeyPatch, layout: Any) -> None:
    """Let a state on the CPU have the layout that one on a GPU has, or that of the files."""

    def built(weights: list[torch.nn.Parameter], *args: Any, **options: Any) -> torch.optim.Optimizer:
        for weight in weights:
            if weight.dim() == 4:
                weight.data = weight.data.contiguous(**layout)
        return build_optimizer(weights, *args, **options)

    monkeypatch.setattr(states, "build_optimizer", built)


def test_a_checkpoint_is_read_in_either_layout(
    written: Checkpoint, layouts: Any, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fused optimizer would take moments in another layout for those of other weights, or refuse them."""
    config, after = TrainConfig(**tiny_settings), []
    for layout in layouts:
        with monkeypatch.context() as patch, accelerator_for(config, use_gpu=False) as accelerator:
            laid_out(patch, layout)
            state = build_state(config, Schedule.of(config, 13, 1), accelerator, written, None)
            for moment in (None, "exp_avg", "exp_avg_sq"):
                assert layout_of(state, moment) == {layout is CHANNELS_LAST}
            (result,) = steps(state, fake_rows(2, 3))
            after.append([result.loss, *(each.detach().clone() for each in state.components.controlnet.parameters())])
    for pair in zip(*after, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


@pytest.fixture
def benchmark() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = before


@pytest.mark.usefixtures("benchmark")
@pytest.mark.parametrize("before", [False, True])
def test_convolutions_are_chosen_by_trial_on_gpus_alone_and_not_in_fp32(before: bool) -> None:
    torch.backends.cudnn.benchmark = before
    for device, dtype in (("cuda", torch.bfloat16), ("cuda", torch.float32), ("cpu", torch.bfloat16)):
        with fastest_convolutions(torch.device(device), dtype):
            assert torch.backends.cudnn.benchmark == (device == "cuda" and dtype == torch.bfloat16)
        assert torch.backends.cudnn.benchmark == before


def test_a_run_tells_its_attention_and_its_fused_layers(tiny_settings: dict[str, Any]) -> None:
    done = fit(TrainConfig(**tiny_settings | {"max_train_steps": 1})).output_dir
    status = json.loads((done / "run.json").read_text())
    assert (status["attention"], status["fused_layers"]) == (["flash_attention"], []), "fused ones are for GPUs"


def test_other_attention_is_told(tiny_settings: dict[str, Any]) -> None:
    with training(tiny_settings) as state, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert attention_kernels(state.components) == ("math",)
        for each in state.components.denoiser.modules():
            if hasattr(each, "processor"):
                each.processor = type("XFormersAttnProcessor", (), {})()
        assert attention_kernels(state.components) == ("xformers",)


def test_ddp_holds_no_gradient_twice(tiny_settings: dict[str, Any]) -> None:
    with accelerator_for(TrainConfig(**tiny_settings), use_gpu=False) as accelerator:
        handler = accelerator.ddp_handler
        assert handler
        assert handler.gradient_as_bucket_view
