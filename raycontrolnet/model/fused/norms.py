"""Normalizations by Triton's kernels, with what is added before them and to their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from raycontrolnet.model.fused import group_norm, layer_norm


class ChannelsLastGroupNorm(torch.nn.GroupNorm):
    """`torch.nn.GroupNorm` whose output is channels-last if its input is, on a GPU."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (as torch names it)
        if not is_channels_last(input):
            return super().forward(input)
        # CUDA's autocast computes norms in fp32, and leaves them so.
        dtype = torch.float32 if torch.is_autocast_enabled(input.device.type) else input.dtype
        return _normalized(self, input, dtype, with_silu=False)[0]


def norm_before_product(
    norm: torch.nn.GroupNorm, images: Tensor, *, with_silu: bool, moves: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normalize images for a convolution or a linear layer, which is all that takes the result.

    Under autocast these layers would round to its dtype what CUDA's norm and SiLU leave in fp32; here the result is
    rounded at once, from fp32 as there. Without autocast the images' dtype stays, and is rounded to once, not twice.

    Args:
        norm: a group norm with weights.
        images: [B, C, H, W] of any dtype; PyTorch normalizes those that are not channels-last.
        with_silu: let the output go through SiLU.
        moves: [B, C], to be added to the images before.

    Returns:
        The normalized images, and the images for what else takes them: then both gradients become one in the norm's.
    """
    if not is_channels_last(images):
        normalized = norm(images if moves is None else images + moves.to(images.dtype)[:, :, None, None])
        return silu(normalized) if with_silu else normalized, images
    return _normalized(norm, images, product_dtype(images), with_silu=with_silu, moves=moves)


def layer_norm_before_product(
    norm: torch.nn.LayerNorm, tokens: Tensor, other: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normalize tokens, or their sum with others, for linear layers, which are all that takes the result.

    It has the dtype to which these would cast it under autocast, where PyTorch's is fp32 and each casts it for itself.

    Args:
        norm: a layer norm of the last dimension, with weights.
        tokens: [..., C].
        other: of the same shape, to be added before.

    Returns:
        The normalized tokens, and the tokens or their sum for what else takes them: then both gradients become one in
        the norm's kernel.
    """
    dtype = product_dtype(tokens)
    found: tuple[Tensor, Tensor] = _LayerNorm.apply(tokens, other, norm.weight, norm.bias, norm.eps, dtype)
    return found


def product_dtype(values: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer or a convolution takes some values: autocast's, or their own."""
    kind = values.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else values.dtype


def is_channels_last(images: Tensor) -> bool:
    """Check for images with the channels as the last dimension in memory, whose other layout would be another."""
    return images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


def _normalized(
    norm: torch.nn.GroupNorm, images: Tensor, dtype: torch.dtype, *, with_silu: bool, moves: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = _GroupNorm.apply(
        images, moves, norm.weight, norm.bias, norm.num_groups, norm.eps, dtype, with_silu
    )
    return found


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = tokens.dtype, None if other is None else other.dtype
        tokens, other = tokens.contiguous(), None if other is None else other.contiguous()
        both, normalized, means, rstds = layer_norm.forward(tokens, other, weight, bias, eps, dtype)
        ctx.save_for_backward(both, weight, means, rstds)
        ctx.set_materialize_grads(False)
        return normalized, both

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, rest: Tensor | None) -> tuple[Tensor | None, ...]:
        both, weight, means, rstds = ctx.saved_tensors
        of_bias = of_weight = None
        of_both = rest
        if gradient is not None:  # else nothing took the normalized tokens
            of_both, of_weights = layer_norm.backward(
                both, gradient.contiguous(), None if rest is None else rest.contiguous(), means, rstds, weight,
                of_weights=any(ctx.needs_input_grad[2:4]),
            )  # fmt: skip
            of_bias, of_weight = (None, None) if of_weights is None else of_weights.to(weight.dtype)
        of_tokens, of_other = (None if dtype is None or of_both is None else of_both.to(dtype) for dtype in ctx.dtypes)
        return of_tokens, of_other, of_weight, of_bias, None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, moves: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float,
        dtype: torch.dtype, with_silu: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        normalized, coefficients = group_norm.forward(images, moves, weight, bias, groups, eps, dtype, silu=with_silu)
        ctx.save_for_backward(images, coefficients)
        ctx.groups, ctx.with_silu, ctx.weights_dtype = groups, with_silu, weight.dtype
        ctx.moves_dtype = None if moves is None else moves.dtype
        ctx.set_materialize_grads(False)
        return normalized, images

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, rest: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:  # nothing took the normalized images
            return rest, *[None] * 7
        images, coefficients = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        rest = None if rest is None else rest.contiguous(memory_format=torch.channels_last)
        of_images, of_channels = group_norm.backward(
            images, gradient, rest, coefficients, ctx.groups, silu=ctx.with_silu
        )
        of_bias, of_weight = (
            of_channels.sum(0).to(ctx.weights_dtype) if any(ctx.needs_input_grad[2:4]) else (None, None)
        )
        of_moves = None
        if ctx.needs_input_grad[1]:
            assert rest is None, "images that are moved are the norm's alone"
            of_moves = of_images.sum((2, 3), dtype=torch.float32).to(ctx.moves_dtype)
        return of_images, of_moves, of_weight, of_bias, None, None, None, None
