"""A Triton kernel of the sum of two channels-last images and a bias; `residual` runs it."""

from __future__ import annotations

import triton
import triton.language as tl

from raycontrolnet.model.fused.shared_kernels import tile_of


@triton.jit
def add(one, other, bias, y, pixels, channels, rows: tl.constexpr, tile: tl.constexpr):
    _, channel, inside, place, there = tile_of(pixels, channels, rows, tile)
    value = tl.load(one + place, mask=there, other=0.0).to(tl.float32)
    value += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    value += tl.load(other + place, mask=there, other=0.0).to(tl.float32)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=there)
