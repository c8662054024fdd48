"""Padded heads: the same result as diffusers' attention, and only where they pay."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from raycontrolnet.model.attention import FAST_HEAD_DIM, PaddedAttnProcessor, pad_narrow_heads
from raycontrolnet.model.components import load_components
from raycontrolnet.settings import ModelConfig


@pytest.mark.parametrize("head_dim", [1, 10, 15])
@pytest.mark.parametrize("crossed", [False, True], ids=["self", "cross"])
def test_the_result_and_its_gradients_are_those_of_diffusers(head_dim: int, crossed: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(query_dim=24, cross_attention_dim=12 if crossed else None, heads=3, dim_head=head_dim)
    padded = deepcopy(layer)
    pad_narrow_heads(padded)
    assert isinstance(padded.processor, PaddedAttnProcessor)
    hidden_states = torch.randn(2, 9, 24)
    encoder_hidden_states = torch.randn(2, 5, 12) if crossed else None
    results = []
    for attention in (layer, padded):
        states = hidden_states.clone().requires_grad_()
        output = attention(states, encoder_hidden_states)
        output.square().sum().backward()
        gradients = [parameter.grad for parameter in attention.parameters()]
        results.append([output, states.grad, *gradients])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_queries_are_scaled_by_their_own_width_and_not_by_the_padded_one() -> None:
    """Fails if the scale is left to torch, which sees 16 columns; with large queries the difference is gross."""
    torch.manual_seed(0)
    layer = Attention(query_dim=24, heads=3, dim_head=4)
    padded = deepcopy(layer)
    pad_narrow_heads(padded)
    states = 20 * torch.randn(1, 9, 24)
    torch.testing.assert_close(padded(states), layer(states), rtol=1e-4, atol=1e-4)


def test_heads_that_are_wide_enough_keep_the_processor_of_diffusers() -> None:
    layer = Attention(query_dim=24, heads=3, dim_head=FAST_HEAD_DIM)
    pad_narrow_heads(layer)
    assert type(layer.processor) is AttnProcessor2_0


def test_models_on_the_cpu_are_padded_and_those_for_a_gpu_are_not(tiny_base: Path) -> None:
    def padded_layers(module: torch.nn.Module) -> int:
        return sum(isinstance(getattr(layer, "processor", None), PaddedAttnProcessor) for layer in module.modules())

    model = ModelConfig(pretrained_model_name_or_path=str(tiny_base))
    components = load_components(model, device=torch.device("cpu"), dtype=torch.float32, seed=0)
    assert padded_layers(components.unet) > 0
    assert padded_layers(components.controlnet) > 0
    assert padded_layers(components.vae) == 0
    assert padded_layers(UNet2DConditionModel.from_pretrained(tiny_base, subfolder="unet")) == 0
    if torch.cuda.is_available():
        components = load_components(model, device=torch.device("cuda"), dtype=torch.float32, seed=0)
        assert padded_layers(components.unet) == 0
