"""Triton kernels of GEGLU (Shazeer 2020, arXiv:2002.05202), one pass each way; `geglu` runs them.

Each program works on some rows and columns, so that no width is a constant: one kernel is compiled for all.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(total, width, rows: tl.constexpr, tile: tl.constexpr):
    """Return the rows and columns of a program, and which of its places exist."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    return row[:, None], column[None, :], (row < total)[:, None] & (column < width)[None, :]


@triton.jit
def forward(both, y, total, width, rows: tl.constexpr, tile: tl.constexpr):
    row, column, inside = _tile(total, width, rows, tile)
    source = both + row * 2 * width + column
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    tl.store(y + row * width + column, (value * gelu).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward(both, dy, gradient, total, width, rows: tl.constexpr, tile: tl.constexpr):
    row, column, inside = _tile(total, width, rows, tile)
    offset = row * 2 * width + column
    value = tl.load(both + offset, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(both + offset + width, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(dy + row * width + column, mask=inside, other=0.0).to(tl.float32)
    normal = 0.5 * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    dtype = gradient.dtype.element_ty
    tl.store(gradient + offset, (slope * gate * normal).to(dtype), mask=inside)
    tl.store(gradient + offset + width, (slope * value * (normal + gate * density)).to(dtype), mask=inside)
