"""Parts of several Triton kernels: the tile that a program works on, and the gradient of SiLU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(total, width, rows: tl.constexpr, tile: tl.constexpr):
    """Return a program's rows and columns, which of the columns exist, its places and which of those exist."""
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < width
    place = row[:, None] * width + column[None, :]
    return row, column, inside, place, (row < total)[:, None] & inside[None, :]


@triton.jit
def before_silu(slope, output):
    """Return the gradient of SiLU's input, `output` of what is before it, by that of its output."""
    sigmoid = tl.sigmoid(output)
    return slope * sigmoid * (1.0 + output * (1.0 - sigmoid))
