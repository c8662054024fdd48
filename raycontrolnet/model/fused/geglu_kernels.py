"""Triton kernels of GEGLU (Shazeer 2020, arXiv:2002.05202), one pass each way; `geglu` runs them.

Each program works on some rows and columns, so that no width is a constant: one kernel is compiled for all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from raycontrolnet.model.fused.shared_kernels import tile_of


@triton.jit
def forward(both, y, total, width, rows: tl.constexpr, tile: tl.constexpr):
    row, column, _, place, inside = tile_of(total, width, rows, tile)
    source = both + row[:, None] * 2 * width + column[None, :]
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    tl.store(y + place, (value * gelu).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward(both, dy, gradient, total, width, rows: tl.constexpr, tile: tl.constexpr):
    row, column, _, place, inside = tile_of(total, width, rows, tile)
    offset = row[:, None] * 2 * width + column[None, :]
    value = tl.load(both + offset, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(both + offset + width, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    normal = 0.5 * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    dtype = gradient.dtype.element_ty
    tl.store(gradient + offset, (slope * gate * normal).to(dtype), mask=inside)
    tl.store(gradient + offset + width, (slope * value * (normal + gate * density)).to(dtype), mask=inside)
