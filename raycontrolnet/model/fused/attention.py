"""diffusers' attention of plain settings, without a pass over its output that divides it by 1."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class PlainAttention(Attention):
    """diffusers' `Attention` of the settings that `is_plain_attention` checks, with PyTorch's attention.

    Calls with a mask or options, and those after another processor has been set, are diffusers'.
    """

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        if attention_mask is not None or cross_attention_kwargs or type(self.processor) is not AttnProcessor2_0:
            found: Tensor = super().forward(
                hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs
            )
            return found
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = self.to_q(hidden_states), self.to_k(context), self.to_v(context)
        query, key, value = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in projected)
        attended = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        project, drop = self.to_out
        output: Tensor = drop(project(attended))
        return output


def is_plain_attention(attention: Attention) -> bool:
    """Check for the settings of Stable Diffusion's transformers: nothing is normalized, scaled or added."""
    others = attention.spatial_norm, attention.group_norm, attention.norm_q, attention.norm_k, attention.norm_cross
    return (
        all(other is None or other is False for other in others)
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
        and isinstance(attention.to_out, torch.nn.ModuleList)
        and len(attention.to_out) == 2
    )
