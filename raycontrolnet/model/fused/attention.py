"""diffusers' attention of plain settings, without passes over its output and its gradients that add nothing."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, scaled_dot_product_attention

from raycontrolnet.model.fused.norms import product_dtype


class PlainAttention(Attention):
    """diffusers' `Attention` of the settings that `is_plain_attention` checks, with PyTorch's attention.

    Nothing divides the output by 1, and products add up the gradients of what queries, keys and values come from. Calls
    with a mask or options, and those after another processor has been set, are diffusers'.
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
        if encoder_hidden_states is None and all(map(_is_product, (self.to_q, self.to_k, self.to_v))):
            dtype = product_dtype(hidden_states)
            weights = (each.weight.to(dtype) for each in (self.to_q, self.to_k, self.to_v))
            projected = _Products.apply(hidden_states.to(dtype), *weights)
        else:
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


def _is_product(layer: torch.nn.Module) -> bool:
    """Check for PyTorch's own linear layer without a bias, not one that a library has wrapped."""
    return type(layer) is torch.nn.Linear and layer.bias is None


class _Products(torch.autograd.Function):
    """Products of the same tokens [..., C] with several weights [D, C]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(tokens, *weights)
        return tuple(linear(tokens, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tokens, *weights = ctx.saved_tensors
        rows = [gradient.flatten(0, -2) for gradient in gradients]
        of_tokens = None
        if ctx.needs_input_grad[0]:
            total = rows[0] @ weights[0]
            for gradient, weight in zip(rows[1:], weights[1:], strict=True):
                total.addmm_(gradient, weight)
            of_tokens = total.view_as(tokens)
        wanted = zip(rows, ctx.needs_input_grad[1:], strict=True)
        return of_tokens, *(gradient.t() @ tokens.flatten(0, -2) if needed else None for gradient, needed in wanted)
