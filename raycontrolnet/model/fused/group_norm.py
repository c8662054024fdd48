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


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, dtype: torch.dtype, *, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize, and return the output in `dtype`, the groups' means and reciprocal standard deviations, fp32 [B, G].

    Args:
        x: [B, C, H, W], channels-last.
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
    sums = torch.empty(images, parts, 2, channels, dtype=torch.float32, device=x.device)
    means, rstds = torch.empty(2, images, groups, dtype=torch.float32, device=x.device)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    if not has_data(x):
        return y, means, rstds
    from raycontrolnet.model.fused import group_norm_kernels as kernels

    kernels.channel_moments[images, parts, tiles](x, sums, pixels, channels, ROWS_SUMMED, ROWS, CHANNELS)
    kernels.group_moments[images, groups](
        x, sums, means, rstds, pixels, eps, parts, channels, size, PARTS_AT_ONCE, next_power_of_2(size)
    )
    kernels.normalized[images, num_parts(pixels, ROWS), tiles](
        x, y, means, rstds, weight, bias, pixels, groups, channels, size, ROWS, CHANNELS, silu
    )
    return y, means, rstds


def backward(
    x: Tensor, dy: Tensor, means: Tensor, rstds: Tensor, weight: Tensor, bias: Tensor, *, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and those of bias and weight for each image, fp32 [2, B, C].

    Args:
        x: the input, [B, C, H, W], channels-last, as is `dy`, the gradient of the output.
        dy: of any dtype.
        means: by `forward`, as `rstds`.
        rstds: [B, G].
        weight: [C].
        bias: [C].
        silu: the output went through SiLU, which is computed again.
    """
    images, channels, height, width = x.shape
    pixels, groups = height * width, means.shape[1]
    size = channels // groups
    parts, tiles = num_parts(pixels, ROWS_SUMMED), num_parts(channels, CHANNELS)
    sums = torch.empty(images, parts, 2, channels, dtype=torch.float32, device=x.device)
    of_channels = torch.empty(2, images, channels, dtype=torch.float32, device=x.device)
    of_groups = torch.empty(2, images, groups, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x)
    if not has_data(x):
        return dx, of_channels
    from raycontrolnet.model.fused import group_norm_kernels as kernels

    kernels.channel_gradients[images, parts, tiles](
        x, dy, means, rstds, weight, bias, sums, pixels, groups, channels, size, ROWS_SUMMED, ROWS, CHANNELS, silu
    )
    kernels.group_gradients[images, groups](
        sums, weight, of_channels, of_groups, pixels, images, parts, channels, size, PARTS_AT_ONCE,
        next_power_of_2(size),
    )  # fmt: skip
    kernels.input_gradient[images, num_parts(pixels, ROWS), tiles](
        x, dy, dx, means, rstds, weight, bias, of_groups, pixels, groups, images, channels, size, ROWS, CHANNELS, silu
    )
    return dx, of_channels
