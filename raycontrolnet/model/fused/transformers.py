"""diffusers' transformers on images that stay channels-last, and GEGLU in one pass."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from raycontrolnet.model.fused import geglu
from raycontrolnet.model.fused.norms import layer_norm_before_product, norm_before_product
from raycontrolnet.model.fused.resnets import is_plain_convolution


class FusedGEGLU(GEGLU):
    """diffusers' `GEGLU` whose activation and product are one pass."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        gated: Tensor = _Gated.apply(self.proj(hidden_states))
        return gated


class FusedTransformerBlock(BasicTransformerBlock):
    """diffusers' `BasicTransformerBlock` of the settings that `is_plain_transformer` checks.

    Each sum is one pass with the norm behind it, and so are both their gradients. Calls with masks or other options are
    diffusers'.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        others = attention_mask, self._chunk_size, *args, *kwargs.values()
        if any(other is not None for other in others):
            found: Tensor = super().forward(hidden_states, attention_mask, encoder_hidden_states, *args, **kwargs)
            return found
        normalized, hidden = layer_norm_before_product(self.norm1, hidden_states)
        normalized, hidden = layer_norm_before_product(self.norm2, self.attn1(normalized), hidden)
        attended = self.attn2(normalized, encoder_hidden_states=encoder_hidden_states)
        normalized, hidden = layer_norm_before_product(self.norm3, attended, hidden)
        summed: Tensor = self.ff(normalized) + hidden
        return summed


class ChannelsLastTransformer2DModel(Transformer2DModel):
    """diffusers' `Transformer2DModel` whose output is channels-last, as its tokens are in memory.

    Convolutions of one pixel are linear layers of the tokens, which add the bias where they compute the product. The
    methods are private in diffusers.
    """

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        normalized, _ = norm_before_product(self.norm, hidden_states, with_silu=False)
        tokens = normalized.permute(0, 2, 3, 1).flatten(1, 2)
        if self.use_linear_projection:
            return self.proj_in(tokens), tokens.shape[-1]
        height, width = hidden_states.shape[2:]
        projected = _convolved(self.proj_in, tokens, height, width)
        return projected, projected.shape[-1]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        # diffusers makes the images contiguous here, in the other layout.
        if self.use_linear_projection:
            tokens = self.proj_out(hidden_states)
        else:
            tokens = _convolved(self.proj_out, hidden_states, height, width)
        return _as_images(tokens, height, width) + residual


def _as_images(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens [B, H * W, C] as images [B, C, H, W], channels-last."""
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _convolved(convolution: torch.nn.Module, tokens: Tensor, height: int, width: int) -> Tensor:
    """Convolve images that are tokens, [B, H * W, C]."""
    if is_plain_convolution(convolution) and convolution.kernel_size == (1, 1):
        return linear(tokens, convolution.weight.flatten(1), convolution.bias)
    images: Tensor = convolution(_as_images(tokens, height, width))
    return images.permute(0, 2, 3, 1).flatten(1, 2)


def is_plain_transformer(block: BasicTransformerBlock) -> bool:
    """Check for the settings of Stable Diffusion's blocks, whose layer norms are PyTorch's own, with biases."""
    norms = block.norm1, block.norm2, block.norm3
    return (
        block.norm_type == "layer_norm"
        and block.pos_embed is None
        and block.attn2 is not None
        and not block.only_cross_attention
        and all(type(norm) is torch.nn.LayerNorm and norm.bias is not None for norm in norms)
    )


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        projected = projected.contiguous()
        ctx.save_for_backward(projected)
        return geglu.forward(projected)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        return geglu.backward(projected, gradient.contiguous())
