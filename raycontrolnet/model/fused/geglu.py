"""GEGLU's activation and product by Triton's kernels, in one pass each way."""

from __future__ import annotations

import torch
from torch import Tensor

from raycontrolnet.model.fused.running import has_data, num_parts

BLOCK = 1024


def forward(both: Tensor) -> Tensor:
    """Return the first half of the last dimension times the GELU of the second."""
    *rows, width = both.shape
    y = both.new_empty(*rows, width // 2)
    if not has_data(both):
        return y
    from raycontrolnet.model.fused import geglu_kernels as kernels

    kernels.forward[(num_parts(y.numel(), BLOCK),)](both, y, y.numel(), width // 2, BLOCK)
    return y


def backward(both: Tensor, dy: Tensor) -> Tensor:
    """Return the gradient of `both`."""
    gradient = torch.empty_like(both)
    if not has_data(both):
        return gradient
    from raycontrolnet.model.fused import geglu_kernels as kernels

    kernels.backward[(num_parts(dy.numel(), BLOCK),)](both, dy, gradient, dy.numel(), dy.shape[-1], BLOCK)
    return gradient
