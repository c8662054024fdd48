"""Fused layers: the results of those they replace, their layout, and what happens where their kernels cannot run.

The kernels themselves run on a GPU (tests/gpu), or where Triton is installed in its interpreter; here are stand-ins.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import fused_stand_ins
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from reference import fake_rows, steps, training
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raycontrolnet.model.components import Components
from raycontrolnet.model.fused.layers import FUSED, fuse_layers, fused_class, problem_of_kernels
from raycontrolnet.model.fused.norms import ChannelsLastGroupNorm, FusedLayerNorm
from raycontrolnet.model.fused.resnets import FusedResnetBlock2D
from raycontrolnet.model.fused.transformers import ChannelsLastTransformer2DModel, norms_before_products
from raycontrolnet.model.performance import fused_layers

INTERPRETED = """
import json, torch
from raycontrolnet.model.fused.layers import problem_of_kernels
dtypes = torch.float32, torch.bfloat16, torch.float16
print(json.dumps([problem_of_kernels(torch.device("cpu"), dtype) for dtype in dtypes]))
"""


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_ins(monkeypatch)


def use_stand_ins(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    for name, module in fused_stand_ins.kernels(**options).items():
        for function, stand_in in vars(module).items():
            monkeypatch.setattr(f"{name}.{function}", stand_in)


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
        "ChannelsLastGroupNorm", "ChannelsLastTransformer2DModel", "FusedGEGLU", "FusedLayerNorm", "FusedResnetBlock2D",
        "PlainAttention",
    )  # fmt: skip
    for model in (components.denoiser, components.controlnet):
        assert not {type(module) for module in model.modules()} & FUSED.keys(), "none is left out"
    assert found == pytest.approx(plain, rel=tolerance)
    assert found != plain, "other arithmetic ran"


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


def test_attention_is_diffusers_but_for_the_division() -> None:
    attention = Attention(8, cross_attention_dim=6, heads=2, dim_head=4)
    tokens, text, mask = torch.randn(2, 5, 8), torch.randn(2, 3, 6), torch.zeros(2, 1, 3)
    calls: tuple[dict[str, Any], ...] = ({}, {"attention_mask": mask}, {"unknown": 1})
    expected = [attention(tokens, text, **options) for options in calls]
    attention.__class__ = fused_class(attention) or pytest.fail("it is plain")
    with Calls() as counted:
        found = [attention(tokens, text, **options) for options in calls]
    assert all(map(torch.equal, found, expected))
    assert counted.found["div"] == 2
    attention.set_processor(AttnProcessor())
    with Calls() as counted:
        assert torch.allclose(attention(tokens, text), expected[0], atol=1e-6)
    assert counted.found["div"] == 1, "that of diffusers' processor"
    others: tuple[dict[str, Any], ...] = (
        {"rescale_output_factor": 2.0}, {"residual_connection": True}, {"norm_num_groups": 2},
        {"qk_norm": "layer_norm"}, {"cross_attention_norm": "layer_norm"},
    )  # fmt: skip
    for options in others:
        assert fused_class(Attention(8, cross_attention_dim=6, heads=2, dim_head=4, **options)) is None


@pytest.mark.usefixtures("stand_ins")
def test_a_layer_norm_has_the_dtype_of_autocast() -> None:
    norm, tokens = FusedLayerNorm(8), torch.randn(2, 5, 8, dtype=torch.bfloat16)
    for values in (tokens.float(), tokens):
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(values).dtype == torch.bfloat16
    assert norm(tokens.float()).dtype == torch.float32
    assert norm.bfloat16()(tokens).dtype == torch.bfloat16


def test_layer_norms_elsewhere_stay() -> None:
    def block(**options: Any) -> BasicTransformerBlock:
        return BasicTransformerBlock(8, 2, 4, cross_attention_dim=6, **options)

    assert len(list(norms_before_products(block()))) == 3
    others: tuple[dict[str, Any], ...] = (
        {"norm_type": "ada_norm", "num_embeds_ada_norm": 3}, {"norm_elementwise_affine": False},
        {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 3},
    )  # fmt: skip
    assert [list(norms_before_products(block(**options))) for options in others] == [[]] * 3


def test_other_images_are_normalized_by_pytorch() -> None:
    norm, plain = ChannelsLastGroupNorm(4, 8), torch.nn.GroupNorm(4, 8)
    for shape in ((2, 8, 6, 5), (2, 8, 1, 1), (2, 8, 7), (2, 8)):
        values = torch.randn(shape)
        assert torch.equal(norm(values), plain(values))


class Calls(TorchDispatchMode):
    """The names of the operators that run, with the number of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("linear", [False, True])
def test_a_transformer_leaves_its_images_channels_last_and_copies_nothing(linear: bool) -> None:
    options = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "norm_num_groups": 4}
    model = Transformer2DModel(**options, use_linear_projection=linear).to(memory_format=torch.channels_last)
    images = torch.randn(2, 16, 4, 6).contiguous(memory_format=torch.channels_last)

    def run() -> tuple[list[Tensor], Counter[str]]:
        inputs = images.clone().requires_grad_()
        with Calls() as calls:
            output = model(inputs, return_dict=False)[0]
            return [output, *torch.autograd.grad(output, [inputs, *model.parameters()], images)], calls.found

    expected, calls = run()
    assert calls["clone"] > 0
    model.__class__ = ChannelsLastTransformer2DModel
    found, calls = run()
    assert calls["clone"] == calls["convolution"] == 0
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(expected, found, strict=True))
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in found[:2])


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shortcut", [False, True])
def test_a_residual_block_makes_few_passes(shortcut: bool, frozen: bool) -> None:
    block = ResnetBlock2D(in_channels=8, out_channels=8, temb_channels=4, groups=4, use_in_shortcut=shortcut)
    block.to(memory_format=torch.channels_last).requires_grad_(not frozen)
    block.__class__ = FusedResnetBlock2D
    images = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = [weight for weight in block.parameters() if weight.requires_grad]
    with Calls() as calls:
        output = block(images, torch.randn(2, 4))
    assert output.is_contiguous(memory_format=torch.channels_last)
    number = calls.found["silu"], calls.found["native_group_norm"], calls.found["div"], calls.found["_to_copy"]
    assert number == (1, 0, 0, 0), "SiLU of the time embedding"
    assert calls.found["convolution"] == 2 + shortcut
    with Calls() as calls:
        torch.autograd.grad(output, [images, *weights], torch.randn_like(output))
    # The stand-ins' own; of the norms' weights, the time embedding and its two biases, the second convolution's.
    assert calls.found["sum"] == 4 + (0 if frozen else 2 + 3 + 1)


def test_other_residual_blocks_stay() -> None:
    class Wrapped(torch.nn.Conv2d):
        pass

    def block(**changes: Any) -> ResnetBlock2D:
        options: dict[str, Any] = {"in_channels": 8, "temb_channels": 4, "groups": 4} | changes
        return ResnetBlock2D(**options)

    wrapped = block()
    wrapped.conv2 = Wrapped(8, 8, 3, padding=1)
    others: tuple[dict[str, Any], ...] = (
        {"dropout": 0.1}, {"time_embedding_norm": "scale_shift"}, {"up": True}, {"down": True},
        {"non_linearity": "gelu"}, {"output_scale_factor": 2.0}, {"temb_channels": None},
    )  # fmt: skip
    for other in (wrapped, *(block(**changes) for changes in others)):
        assert fused_class(other) is None
    for plain in (block(), block(out_channels=16), block(use_in_shortcut=True, conv_shortcut_bias=False)):
        assert fused_class(plain) is FusedResnetBlock2D


@pytest.mark.usefixtures("stand_ins")
def test_a_residual_block_turns_its_images() -> None:
    block = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=4, groups=4)
    embedding, images, pixel = torch.randn(2, 4), torch.randn(2, 8, 6, 5), torch.randn(2, 8, 1, 1)
    expected, of_pixel = block(images, embedding), block(pixel, embedding)
    block.__class__ = FusedResnetBlock2D
    found = block(images, embedding)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(block(pixel, embedding), of_pixel), "which has no layout"


def test_without_kernels_the_layers_stay_and_the_log_says_why(
    tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "raycontrolnet.model.fused.group_norm", None)
    with training(tiny_settings) as state, caplog.at_level(logging.WARNING):
        fuse_layers(state.components)
        assert fused_layers(state.components) == ()
    assert "training goes on with PyTorch's layers, more slowly: fused ones cannot run here: " in caplog.text
    assert "ModuleNotFoundError" in caplog.text or "ImportError" in caplog.text


@pytest.mark.parametrize(
    ("kernels", "layer"),
    [("group_norm", "ChannelsLastGroupNorm"), ("residual", "FusedResnetBlock2D"), ("geglu", "FusedGEGLU"),
     ("layer_norm", "FusedLayerNorm"), ("", "")],
)  # fmt: skip
def test_kernels_that_compute_something_else_are_not_used(
    kernels: str, layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for factor, dtype in ((1.001, torch.float32), (1.1, torch.bfloat16)):
        use_stand_ins(monkeypatch, wrong=kernels, factor=factor)
        problem = problem_of_kernels(torch.device("cpu"), dtype)
        if not layer or (layer == "FusedLayerNorm" and dtype == torch.float32):  # which is PyTorch's without autocast
            assert problem is None
        else:
            assert f"{layer} differs" in str(problem)


@pytest.mark.usefixtures("stand_ins")
def test_the_trial_draws_nothing_from_the_process() -> None:
    before = torch.get_rng_state()
    assert problem_of_kernels(torch.device("cpu"), torch.float32) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_the_kernels_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], capture_output=True, text=True, check=True, env=environment,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert json.loads(done.stdout) == [None] * 3
