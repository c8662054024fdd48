"""Fused blocks: diffusers' results in fewer passes over the images, and diffusers' own blocks for other settings."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from fused_stand_ins import Calls, use_stand_ins
from torch import Tensor

from raycontrolnet.model.fused.attention import PlainAttention
from raycontrolnet.model.fused.embeddings import FusedConditioningEmbedding
from raycontrolnet.model.fused.layers import fused_class
from raycontrolnet.model.fused.norms import layer_norm_before_product
from raycontrolnet.model.fused.resnets import FusedResnetBlock2D
from raycontrolnet.model.fused.transformers import ChannelsLastTransformer2DModel, FusedTransformerBlock
from raycontrolnet.model.fused.trials import with_gradients
from raycontrolnet.predict.shape_tensors import ShapeMode


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_ins(monkeypatch)


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


def test_self_attention_adds_up_gradients_in_its_products() -> None:
    """The results of diffusers, with no sum of them; of weights that a library has wrapped, diffusers' products."""
    attention, tokens = Attention(8, heads=2, dim_head=4), torch.randn(2, 5, 8)

    def run() -> tuple[list[Tensor], int]:
        with Calls() as calls:
            return with_gradients(attention, tokens), calls.found["add"]

    expected, plain = run()
    attention.__class__ = PlainAttention
    found, sums = run()
    assert (plain, sums) == (2, 0)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(expected, found, strict=True))
    attention.to_k = torch.nn.Sequential(attention.to_k)
    assert run()[1] == 2


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
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(expected, found, strict=True))
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


class Wrapped(torch.nn.Conv2d):
    """A convolution as a library wraps it."""


@pytest.mark.usefixtures("stand_ins")
def test_control_images_are_embedded_in_few_passes() -> None:
    embedding = ControlNetConditioningEmbedding(32, block_out_channels=(8, 16))
    torch.nn.init.normal_(embedding.conv_out.weight)
    for images in (torch.rand(2, 3, 16, 24), torch.rand(2, 3, 16, 24).to(memory_format=torch.channels_last)):
        embedding.__class__ = ControlNetConditioningEmbedding
        expected = with_gradients(embedding, images)
        embedding.__class__ = FusedConditioningEmbedding
        with Calls() as calls:
            found = with_gradients(embedding, images)
        assert calls.found["silu"] == 0
        assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(expected, found, strict=True))
    embedding = ControlNetConditioningEmbedding(32, block_out_channels=(8, 16))
    assert fused_class(embedding) is FusedConditioningEmbedding
    embedding.blocks[0] = Wrapped(8, 8, 3)
    assert fused_class(embedding) is None


def test_other_residual_blocks_stay() -> None:
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
@pytest.mark.parametrize("shortcut", [False, True])
def test_a_residual_blocks_gradients_become_one_in_the_norms(shortcut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    block = ResnetBlock2D(in_channels=8, temb_channels=4, groups=4, use_in_shortcut=shortcut)
    images = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    expected = with_gradients(block, images, embedding := torch.randn(2, 4))
    kernels, added = sys.modules["raycontrolnet.model.fused.group_norm"], list[bool]()

    def backward(*arguments: Any, kernel: Any = kernels.backward, **options: Any) -> Any:
        added.append(arguments[2] is not None)
        return kernel(*arguments, **options)

    monkeypatch.setattr(kernels, "backward", backward)
    block.__class__ = FusedResnetBlock2D
    found = with_gradients(block, images, embedding)
    assert added == [False, True], "the second norm's, then the first's with that of the residual"
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(expected, found, strict=True))


@pytest.mark.usefixtures("stand_ins")
def test_a_residual_block_turns_its_images() -> None:
    block = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=4, groups=4)
    embedding, images, pixel = torch.randn(2, 4), torch.randn(2, 8, 6, 5), torch.randn(2, 8, 1, 1)
    expected, of_pixel = block(images, embedding), block(pixel, embedding)
    block.__class__ = FusedResnetBlock2D
    found = block(images, embedding)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(block(pixel, embedding), of_pixel), "which has no layout"


@pytest.mark.usefixtures("stand_ins")
def test_a_layer_norm_has_the_dtype_of_autocast() -> None:
    norm, tokens = torch.nn.LayerNorm(8), torch.randn(2, 5, 8, dtype=torch.bfloat16)

    def dtypes(*values: Tensor) -> list[torch.dtype]:
        return [each.dtype for each in layer_norm_before_product(norm, *values)]

    with torch.autocast("cpu", torch.bfloat16):
        assert dtypes(tokens.float()) == [torch.bfloat16, torch.float32]
        assert dtypes(tokens, tokens) == [torch.bfloat16] * 2
        assert dtypes(tokens, tokens.float()) == [torch.bfloat16, torch.float32]
    assert dtypes(tokens.float()) == [torch.float32] * 2
    norm.bfloat16()
    assert dtypes(tokens, tokens) == [torch.bfloat16] * 2


@pytest.mark.usefixtures("stand_ins")
def test_a_transformer_block_is_diffusers() -> None:
    """Its results; with a mask or in chunks its own code."""
    block = BasicTransformerBlock(8, 2, 4, cross_attention_dim=6)
    tokens, text, mask = torch.randn(2, 5, 8), torch.randn(2, 3, 6), torch.zeros(2, 1, 3)
    masked = block(tokens, encoder_hidden_states=text, encoder_attention_mask=mask)
    expected = with_gradients(block, tokens, None, text)
    block.__class__ = FusedTransformerBlock
    found = with_gradients(block, tokens, None, text)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert torch.equal(masked, block(tokens, encoder_hidden_states=text, encoder_attention_mask=mask))
    block.set_chunk_feed_forward(1, 1)
    assert torch.allclose(block(tokens, None, text), expected[0], atol=1e-4)


def test_a_transformer_block_adds_in_its_norms() -> None:
    def sums(cls: type[BasicTransformerBlock]) -> int:
        with ShapeMode():
            block, tokens = cls(8, 2, 4, cross_attention_dim=6), torch.randn(2, 5, 8, requires_grad=True)
            for attention in (block.attn1, block.attn2):
                attention.__class__ = PlainAttention
            with Calls() as calls:
                block(tokens, None, torch.randn(2, 3, 6)).tanh().sum().backward()
        return calls.found["add"]

    assert sums(BasicTransformerBlock) == 3 + 3, "before norms and at the end, and of their gradients"
    assert sums(FusedTransformerBlock) == 1, "at the end"


def test_other_transformer_blocks_stay() -> None:
    def block(**options: Any) -> BasicTransformerBlock:
        return BasicTransformerBlock(8, 2, 4, cross_attention_dim=6, **options)

    assert fused_class(block()) is FusedTransformerBlock
    others: tuple[dict[str, Any], ...] = (
        {"norm_type": "ada_norm", "num_embeds_ada_norm": 3}, {"norm_elementwise_affine": False},
        {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 3}, {"only_cross_attention": True},
    )  # fmt: skip
    assert [fused_class(block(**options)) for options in others] == [None] * 4
