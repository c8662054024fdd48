"""Triton kernels of SiLU of a channels-last image and a bias, one pass each way; `biased_silu` runs them.

The bias's gradient is summed over some pixels by each program, and over the programs by PyTorch: nothing is added
atomically, so that the same input gives the same bits. All arithmetic is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from raycontrolnet.model.fused.shared_kernels import before_silu, tile_of


@triton.jit
def forward(x, bias, y, pixels, channels, rows: tl.constexpr, tile: tl.constexpr):
    _, channel, inside, place, there = tile_of(pixels, channels, rows, tile)
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + place, (value * tl.sigmoid(value)).to(y.dtype.element_ty), mask=there)


@triton.jit
def backward(x, dy, bias, dx, sums, total, channels: tl.constexpr, summed: tl.constexpr, rows: tl.constexpr,
             padded: tl.constexpr, of_bias: tl.constexpr):  # fmt: skip
    """Compute dx of some pixels, and sum it over them."""
    part = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, padded)
    inside = channel < channels
    shift = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    added = tl.zeros([rows, padded], tl.float32)
    for start in range(0, summed, rows):
        pixel = part * summed + start + tl.arange(0, rows)
        there = (pixel < total)[:, None] & inside[None, :]
        place = pixel[:, None] * channels + channel[None, :]
        value = tl.load(x + place, mask=there, other=0.0).to(tl.float32) + shift
        slope = tl.load(dy + place, mask=there, other=0.0).to(tl.float32)
        gradient = before_silu(slope, value)
        tl.store(dx + place, gradient.to(dx.dtype.element_ty), mask=there)
        if of_bias:
            added += gradient
    if of_bias:
        tl.store(sums + part * channels + channel, tl.sum(added, 0), mask=inside)
