"""Triton kernels of GEGLU (Shazeer 2020, arXiv:2002.05202), one pass each way; `geglu` runs them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward(both, y, total, width: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < total
    row, column = place // width, place % width
    source = both + row * 2 * width + column
    value = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
    gelu = 0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    tl.store(y + place, (value * gelu).to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward(both, dy, gradient, total, width: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < total
    row, column = place // width, place % width
    offset = row * 2 * width + column
    value = tl.load(both + offset, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(both + offset + width, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    normal = 0.5 * (1.0 + tl.math.erf(gate * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    dtype = gradient.dtype.element_ty
    tl.store(gradient + offset, (slope * gate * normal).to(dtype), mask=inside)
    tl.store(gradient + offset + width, (slope * value * (normal + gate * density)).to(dtype), mask=inside)
