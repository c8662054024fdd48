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


def has_data(tensor: Tensor) -> bool:
    """Check for a tensor in memory, of which a kernel can be given the address.

    Tensors of modes that predict shapes alone have an operators' table of their own; what is allocated for them is
    counted, and no kernel runs, nor has Triton to be installed.
    """
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
