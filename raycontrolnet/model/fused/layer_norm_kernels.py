"""Triton kernels of layer normalization over the last dimension, a whole row at a time; `layer_norm` runs them.

The weights' gradients are summed over some rows by each program, and over the programs by PyTorch: nothing is added
atomically, so that the same input gives the same bits. All arithmetic is fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["with_other"])
def forward(x, other, both, y, means, rstds, weight, bias, total, with_other, eps, width: tl.constexpr,
            rows: tl.constexpr, padded: tl.constexpr):  # fmt: skip
    """Normalize rows of x, or if `with_other` is not 0 of its sum with another, which is rounded first and stored."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.arange(0, padded)
    inside = column < width
    there = (row < total)[:, None] & inside[None, :]
    place = row[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    summed = there & (with_other != 0)
    value += tl.load(other + place, mask=summed, other=0.0).to(tl.float32)
    rounded = value.to(both.dtype.element_ty)
    tl.store(both + place, rounded, mask=summed)
    value = rounded.to(tl.float32)
    mean = tl.sum(value, 1) / width
    off = tl.where(there, value - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(off * off, 1) / width + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    output = off * rstd[:, None] * scale[None, :] + shift[None, :]
    tl.store(y + place, output.to(y.dtype.element_ty), mask=there)
    tl.store(means + row, mean, mask=row < total)
    tl.store(rstds + row, rstd, mask=row < total)


@triton.jit
def backward(x, dy, rest, dx, sums, means, rstds, weight, total, width: tl.constexpr, summed: tl.constexpr,
             rows: tl.constexpr, padded: tl.constexpr, with_rest: tl.constexpr, of_weights: tl.constexpr):  # fmt: skip
    """Compute dx of some rows, to which `rest` is added, and sum over them dy and dy times the normalized x."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, padded)
    inside = column < width
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    of_bias = tl.zeros([rows, padded], tl.float32)
    of_weight = tl.zeros([rows, padded], tl.float32)
    for start in range(0, summed, rows):
        row = part * summed + start + tl.arange(0, rows)
        there = (row < total)[:, None] & inside[None, :]
        place = row[:, None] * width + column[None, :]
        mean = tl.load(means + row, mask=row < total, other=0.0)[:, None]
        rstd = tl.load(rstds + row, mask=row < total, other=0.0)[:, None]
        value = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        value = tl.where(there, (value - mean) * rstd, 0.0)
        slope = tl.load(dy + place, mask=there, other=0.0).to(tl.float32)
        scaled = slope * scale
        along = (tl.sum(scaled, 1) / width)[:, None]
        against = (tl.sum(scaled * value, 1) / width)[:, None]
        gradient = rstd * (scaled - along - value * against)
        if with_rest:
            gradient += tl.load(rest + place, mask=there, other=0.0).to(tl.float32)
        tl.store(dx + place, gradient.to(dx.dtype.element_ty), mask=there)
        if of_weights:
            of_bias += slope
            of_weight += slope * value
    if of_weights:
        tl.store(sums + part * 2 * width + column, tl.sum(of_bias, 0), mask=inside)
        tl.store(sums + (part * 2 + 1) * width + column, tl.sum(of_weight, 0), mask=inside)
