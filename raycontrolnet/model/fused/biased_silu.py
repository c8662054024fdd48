"""SiLU of an image and a convolution's bias by Triton's kernels, in one pass each way."""

from __future__ import annotations

import torch
from torch import Tensor

from raycontrolnet.model.fused.running import has_data, next_power_of_2, num_parts, parts_of_rows

ROWS, CHANNELS = 128, 16
"""Pixels and channels that a program computes: the embedding's largest images have 16 channels."""
PIXELS_SUMMED = 2048
"""Pixels over which a program sums, at most."""


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """Return the SiLU of x and the bias together, in the dtype of x.

    Args:
        x: [B, C, H, W], channels-last.
        bias: [C].
    """
    y = torch.empty_like(x)
    if has_data(x):
        from raycontrolnet.model.fused import biased_silu_kernels as kernels

        channels = x.shape[1]
        pixels = x.numel() // channels
        grid = num_parts(pixels, ROWS), num_parts(channels, CHANNELS)
        kernels.forward[grid](x, bias, y, pixels, channels, ROWS, CHANNELS)
    return y


def backward(x: Tensor, dy: Tensor, bias: Tensor, *, of_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of x, and if wanted that of the bias, fp32 [C].

    Args:
        x: the input, [B, C, H, W], channels-last, as is `dy`, the gradient of the output.
        dy: of any dtype.
        bias: [C].
        of_bias: return its gradient.
    """
    channels = x.shape[1]
    pixels, padded = x.numel() // channels, next_power_of_2(channels)
    rows, summed = parts_of_rows(pixels, padded, PIXELS_SUMMED)
    parts = num_parts(pixels, summed)
    sums = torch.empty(parts if of_bias else 0, channels, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x)
    if has_data(x):
        from raycontrolnet.model.fused import biased_silu_kernels as kernels

        kernels.backward[(parts,)](x, dy, bias, dx, sums, pixels, channels, summed, rows, padded, of_bias)
    return dx, sums.sum(0) if of_bias else None
