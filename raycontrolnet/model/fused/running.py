"""Helpers of the functions that run kernels: parts of a size, and a look for tensors without data."""

from __future__ import annotations

import torch
from torch import Tensor


def num_parts(total: int, part: int) -> int:
    """Return the number of parts that cover a total, the last of which may be smaller."""
    return -(-total // part)


def next_power_of_2(number: int) -> int:
    """Return the least power of 2 that is not below a positive number."""
    return 1 << (number - 1).bit_length()


HELD = 2048
"""Numbers that a program holds at once, if a row is not longer."""
PROGRAMS = 1024
"""Programs among which rows are shared, at least, before one gets as many as it may."""


def parts_of_rows(total: int, padded: int, most: int) -> tuple[int, int]:
    """Return the rows that a program holds at once, and those over which it sums: powers of 2.

    Args:
        total: number of rows.
        padded: length of a row, a power of 2.
        most: rows over which a program sums, a power of 2.
    """
    rows = max(1, HELD // padded)
    return rows, max(rows, min(most, next_power_of_2(max(1, total // PROGRAMS))))


def has_data(tensor: Tensor) -> bool:
    """Check for a tensor in memory, of which a kernel can be given the address.

    Tensors of modes that predict shapes alone have an operators' table of their own; what is allocated for them is
    counted, and no kernel runs, nor has Triton to be installed.
    """
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
