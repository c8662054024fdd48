"""GEGLU's activation and product by Triton's kernels, in one pass each way."""

from __future__ import annotations

import torch
from torch import Tensor

from raycontrolnet.model.fused.running import has_data, num_parts

ROWS, COLUMNS = 4, 256
"""Rows and columns of the output that a program computes."""


def forward(both: Tensor) -> Tensor:
    """Return the first half of the last dimension times the GELU of the second."""
    *rows, width = both.shape
    y = both.new_empty(*rows, width // 2)
    if not has_data(both):
        return y
    from raycontrolnet.model.fused import geglu_kernels as kernels

    kernels.forward[_grid(y)](both, y, y.numel() // y.shape[-1], y.shape[-1], ROWS, COLUMNS)
    return y


def backward(both: Tensor, dy: Tensor) -> Tensor:
    """Return the gradient of `both`."""
    gradient = torch.empty_like(both)
    if not has_data(both):
        return gradient
    from raycontrolnet.model.fused import geglu_kernels as kernels

    kernels.backward[_grid(dy)](both, dy, gradient, dy.numel() // dy.shape[-1], dy.shape[-1], ROWS, COLUMNS)
    return gradient


def _grid(y: Tensor) -> tuple[int, int]:
    return num_parts(y.numel() // y.shape[-1], ROWS), num_parts(y.shape[-1], COLUMNS)
