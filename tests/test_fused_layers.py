"""Fused layers: their results, their layout, and what happens where their kernels cannot run.

Here stand-ins take the place of the kernels, which test_kernels.py tests, and tests/gpu on a GPU.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fused_stand_ins import use_stand_ins
from numpy.typing import NDArray
from PIL import Image
from reference import fake_rows, steps, training, write_trained_controlnet

from raycontrolnet.model.components import Components
from raycontrolnet.model.fused.layers import FUSED, fuse_layers, problem_of_kernels
from raycontrolnet.model.fused.norms import ChannelsLastGroupNorm
from raycontrolnet.model.performance import fused_layers, working_precision
from raycontrolnet.sampling.pipeline import DrawOptions, build_pipeline, draw


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_ins(monkeypatch)


def results(settings: dict[str, Any], *, fused: bool) -> tuple[list[float], Components]:
    """Return the losses and gradient norms of three updates, and the models after them."""
    with training(settings | {"learning_rate": 1e-3}) as state:
        state.components.controlnet.to(memory_format=torch.channels_last)
        if fused:
            fuse_layers(state.components)
        taken = steps(state, fake_rows(0, 1), fake_rows(2, 3), fake_rows(4, 5))
        figures = [float(value) for step in taken for value in (step.loss, step.grad_norm)]
        return figures, state.components


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({"mixed_precision": "no"}, 1e-5), ({"mixed_precision": "bf16"}, 2e-2), ({"gradient_checkpointing": True}, 1e-5)],
)
@pytest.mark.parametrize("base", ["tiny_base", "tiny_xl_base"])
def test_a_step_is_that_of_the_layers_they_replace(
    base: str, changes: dict[str, Any], tolerance: float, tiny_settings: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    settings = tiny_settings | changes | {"pretrained_model_name_or_path": str(request.getfixturevalue(base))}
    plain, components = results(settings, fused=False)
    assert fused_layers(components) == ()
    found, components = results(settings, fused=True)
    assert fused_layers(components) == (
        "ChannelsLastGroupNorm", "ChannelsLastTransformer2DModel", "FusedConditioningEmbedding", "FusedGEGLU",
        "FusedResnetBlock2D", "FusedTransformerBlock", "PlainAttention",
    )  # fmt: skip
    for model in (components.denoiser, components.controlnet):
        assert not {type(module) for module in model.modules()} & FUSED.keys(), "none is left out"
    assert found == pytest.approx(plain, rel=tolerance)
    assert found != plain, "other arithmetic ran"


@pytest.mark.usefixtures("stand_ins")
def test_images_are_those_of_the_layers_they_replace(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """Without gradients, of other sizes, with guidance, by a ControlNet that has an effect; in bf16 by rounding."""
    controlnet = write_trained_controlnet(Path(tiny_settings["pretrained_model_name_or_path"]), tmp_path / "controlnet")
    control = Image.effect_noise((64, 32), 100).convert("RGB")

    def drawn(precision: str, *, fused: bool) -> NDArray[np.float64]:
        options = DrawOptions(resolution=64, num_inference_steps=3, precision=working_precision(precision))
        changes = {"mixed_precision": precision, "controlnet_model_name_or_path": str(controlnet)}
        with training(tiny_settings | changes) as state:
            if fused:
                fuse_layers(state.components)
            pipeline = build_pipeline(state.components)
            images = draw(pipeline, state.components, ["a red circle"] * 3, [control] * 3, [0, 1, 2], options)
        return np.stack([np.asarray(image, np.float64) for image in images])

    plain, found, half = drawn("no", fused=False), drawn("no", fused=True), drawn("bf16", fused=True)
    assert np.abs(plain - found).max() <= 1
    assert np.abs(plain - half).mean() < 0.1 * np.abs(plain[0] - plain[1]).mean(), "of other seeds"
    assert (plain != half).any()


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_norm_keeps_the_layout_and_is_fp32_under_autocast(autocast: bool) -> None:
    norm = ChannelsLastGroupNorm(4, 8)
    images = torch.randn(2, 8, 6, 5, dtype=torch.bfloat16 if autocast else torch.float32)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = norm(images)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(found.tanh().sum(), images)
    assert gradient.dtype == images.dtype
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_other_images_are_normalized_by_pytorch() -> None:
    norm, plain = ChannelsLastGroupNorm(4, 8), torch.nn.GroupNorm(4, 8)
    for shape in ((2, 8, 6, 5), (2, 8, 1, 1), (2, 8, 7), (2, 8)):
        values = torch.randn(shape)
        assert torch.equal(norm(values), plain(values))


def test_without_kernels_the_layers_stay_and_the_log_says_why(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "raycontrolnet.model.fused.group_norm_kernels", None)
    monkeypatch.delattr("raycontrolnet.model.fused.group_norm_kernels", raising=False)
    with training(tiny_settings) as state, caplog.at_level(logging.WARNING):
        fuse_layers(state.components)
        assert fused_layers(state.components) == ()
    assert "training goes on with PyTorch's layers, more slowly: fused ones cannot run here: " in caplog.text
    assert "ModuleNotFoundError" in caplog.text or "ImportError" in caplog.text


@pytest.mark.parametrize(
    ("kernels", "layer"),
    [("group_norm", "ChannelsLastGroupNorm"), ("residual", "FusedResnetBlock2D"), ("geglu", "FusedGEGLU"),
     ("layer_norm", "FusedTransformerBlock"), ("biased_silu", "FusedConditioningEmbedding"), ("", "")],
)  # fmt: skip
def test_kernels_that_compute_something_else_are_not_used(
    kernels: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for factor, dtype in ((1.001, torch.float32), (1.1, torch.bfloat16)):
        use_stand_ins(monkeypatch, wrong=kernels, factor=factor)
        problem = problem_of_kernels(torch.device("cpu"), dtype)
        if not layer:
            assert problem is None
        else:
            assert f"{layer} differs" in str(problem)


@pytest.mark.usefixtures("stand_ins")
def test_the_trial_draws_nothing_from_the_process() -> None:
    before = torch.get_rng_state()
    assert problem_of_kernels(torch.device("cpu"), torch.float32) is None
    assert torch.equal(torch.get_rng_state(), before)
