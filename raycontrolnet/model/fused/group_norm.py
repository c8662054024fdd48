"""Group normalization over channels-last images by Triton's kernels, with or without SiLU behind."""

from __future__ import annotations

import torch
from torch import Tensor

from raycontrolnet.model.fused.running import has_data, next_power_of_2, num_parts

ROWS, CHANNELS = 32, 64
"""Pixels and channels that a program holds at once."""
ROWS_SUMMED = 128
"""Pixels over which a program sums."""
PARTS_AT_ONCE = 16
"""Sums over parts of the pixels that a program adds up at once."""
LEAST_PADDED = 64
"""Channels that a program of a group holds, if the group has no more: one kernel for groups of many sizes."""


def forward(
    x: Tensor,
    moves: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    dtype: torch.dtype,
    *,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Normalize, and return the output in `dtype`, and the coefficients of each image and channel, fp32 [B, 4, C].

    These are scale and shift, by which x becomes the output before SiLU, the group's mean less the move, and the
    group's reciprocal standard deviation.

    Args:
        x: [B, C, H, W], channels-last.
        moves: [B, C], to be added to x before; None for nothing.
        weight: [C].
        bias: [C].
        groups: G.
        eps: added to the variance.
        dtype: of the output, [B, C, H, W], channels-last.
        silu: let the output go through SiLU.
    """
    images, channels, height, width = x.shape
    pixels, size = height * width, channels // groups
    parts, tiles = num_parts(pixels, ROWS_SUMMED), num_parts(channels, CHANNELS)
    steps, padded = _of_groups(parts, size)
    sums = torch.empty(images, parts, 2, channels, dtype=torch.float32, device=x.device)
    coefficients = torch.empty(images, 4, channels, dtype=torch.float32, device=x.device)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    if not has_data(x):
        return y, coefficients
    from raycontrolnet.model.fused import group_norm_kernels as kernels

    kernels.channel_moments[images, parts, tiles](x, sums, pixels, channels, ROWS_SUMMED, ROWS, CHANNELS)
    kernels.group_moments[images, groups](
        x, sums, weight, bias, bias if moves is None else moves, coefficients, pixels, eps, parts, channels, size,
        int(moves is not None), steps, PARTS_AT_ONCE, padded,
    )  # fmt: skip
    kernels.normalized[images, num_parts(pixels, ROWS), tiles](
        x, y, coefficients, pixels, channels, ROWS, CHANNELS, silu
    )
    return y, coefficients


def backward(
    x: Tensor, dy: Tensor, rest: Tensor | None, coefficients: Tensor, groups: int, *, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and those of bias and weight for each image, fp32 [B, 2, C].

    Args:
        x: the input, [B, C, H, W], channels-last, as is `dy`, the gradient of the output.
        dy: of any dtype.
        rest: gradient of x by what else takes it, to be added, channels-last; None if nothing does.
        coefficients: by `forward`.
        groups: G.
        silu: the output went through SiLU, which is computed again.
    """
    images, channels, height, width = x.shape
    pixels, size = height * width, channels // groups
    parts, tiles = num_parts(pixels, ROWS_SUMMED), num_parts(channels, CHANNELS)
    steps, padded = _of_groups(parts, size)
    sums = torch.empty(images, parts, 2, channels, dtype=torch.float32, device=x.device)
    of_channels, corrections = torch.empty(2, images, 2, channels, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x)
    if not has_data(x):
        return dx, of_channels
    from raycontrolnet.model.fused import group_norm_kernels as kernels

    kernels.channel_gradients[images, parts, tiles](
        x, dy, coefficients, sums, pixels, channels, ROWS_SUMMED, ROWS, CHANNELS, silu
    )
    kernels.group_gradients[images, groups](
        sums, coefficients, of_channels, corrections, pixels, parts, channels, size, steps, PARTS_AT_ONCE, padded
    )
    kernels.input_gradient[images, num_parts(pixels, ROWS), tiles](
        x, dy, dx if rest is None else rest, dx, coefficients, corrections, pixels, channels, ROWS, CHANNELS, silu,
        rest is not None,
    )  # fmt: skip
    return dx, of_channels


def _of_groups(parts: int, size: int) -> tuple[int, int]:
    """Return the steps in which a group's program adds up its sums, and the channels that it holds, a power of 2."""
    return num_parts(parts, PARTS_AT_ONCE), max(LEAST_PADDED, next_power_of_2(size))
