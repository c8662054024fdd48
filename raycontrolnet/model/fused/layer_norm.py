"""Layer normalization by Triton's kernels, of a sum and of an output of another dtype than the weights'."""

from __future__ import annotations

import torch
from torch import Tensor

from raycontrolnet.model.fused.running import has_data, next_power_of_2, num_parts, parts_of_rows

ROWS_SUMMED = 64
"""Rows over which a program sums, at most."""


def forward(
    x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalize x, or its sum with another tensor.

    Args:
        x: [..., C], contiguous.
        other: of the shape of x, contiguous; None to normalize x alone.
        weight: [C].
        bias: [C].
        eps: added to the variance.
        dtype: of the output, [..., C].

    Returns:
        What is normalized: the sum, in the dtype to which PyTorch would promote it, or x itself; the output in `dtype`;
        the rows' means and reciprocal standard deviations, fp32 [...].
    """
    *shape, width = x.shape
    total, padded = x.numel() // width, next_power_of_2(width)
    means, rstds = torch.empty(2, *shape, dtype=torch.float32, device=x.device)
    both = x if other is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, other.dtype))
    y = torch.empty_like(x, dtype=dtype)
    if not has_data(x):
        return both, y, means, rstds
    from raycontrolnet.model.fused import layer_norm_kernels as kernels

    rows, _ = parts_of_rows(total, padded, ROWS_SUMMED)
    kernels.forward[(num_parts(total, rows),)](
        x, x if other is None else other, both, y, means, rstds, weight, bias, total, int(other is not None), eps,
        width, rows, padded,
    )  # fmt: skip
    return both, y, means, rstds


def backward(
    x: Tensor, dy: Tensor, rest: Tensor | None, means: Tensor, rstds: Tensor, weight: Tensor, *, of_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient of x, and if wanted those of bias and weight, fp32 [2, C].

    Args:
        x: what was normalized, [..., C], contiguous, as is `dy`, the gradient of the output.
        dy: of any dtype.
        rest: gradient of x by what else takes it, to be added, contiguous; None if nothing does.
        means: by `forward`, as `rstds`.
        rstds: [...].
        weight: [C].
        of_weights: return the weights' gradients.
    """
    width = x.shape[-1]
    total, padded = x.numel() // width, next_power_of_2(width)
    rows, summed = parts_of_rows(total, padded, ROWS_SUMMED)
    parts = num_parts(total, summed)
    sums = torch.empty(parts if of_weights else 0, 2, width, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x)
    if has_data(x):
        from raycontrolnet.model.fused import layer_norm_kernels as kernels

        kernels.backward[(parts,)](
            x, dy, dx if rest is None else rest, dx, sums, means, rstds, weight, total, width, summed, rows, padded,
            rest is not None, of_weights,
        )  # fmt: skip
    return dx, sums.sum(0) if of_weights else None
