"""The fused kernels' functions in PyTorch's operators: their formulas, for machines without a GPU."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu


def kernels(*, factor: float = 1.0) -> dict[str, ModuleType]:
    """Return the modules by name; with a `factor` that is not 1, of gradients that are wrong."""

    def norm_backward(*arguments: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
        of_x, of_channels = _norm_backward(*arguments, with_silu=silu)
        return of_x * factor, of_channels

    modules = {
        "group_norm": SimpleNamespace(forward=_norm_forward, backward=norm_backward),
        "geglu": SimpleNamespace(forward=_gated, backward=_gated_backward),
        "residual": SimpleNamespace(forward=_sum),
    }
    return {f"raycontrolnet.model.fused.{name}": cast("ModuleType", module) for name, module in modules.items()}


def _grouped(values: Tensor, groups: int) -> Tensor:
    """Return images [B, C, H, W] as fp32 [B, G, C / G, H * W]."""
    return values.float().reshape(values.shape[0], groups, values.shape[1] // groups, -1)


def _norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, dtype: torch.dtype, *, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grouped = _grouped(x, groups)
    means = grouped.mean((2, 3))
    rstds = (grouped.var((2, 3), correction=0) + eps).rsqrt()
    normalized = ((grouped - means[..., None, None]) * rstds[..., None, None]).reshape(x.shape)
    y = normalized * weight.float()[:, None, None] + bias.float()[:, None, None]
    if silu:
        y = y * y.sigmoid()
    return y.to(dtype, memory_format=torch.channels_last), means, rstds


def _norm_backward(
    x: Tensor, gradient: Tensor, means: Tensor, rstds: Tensor, weight: Tensor, bias: Tensor, *, with_silu: bool
) -> tuple[Tensor, Tensor]:
    groups = means.shape[1]
    normalized = (_grouped(x, groups) - means[..., None, None]) * rstds[..., None, None]
    of_group = 1, groups, -1, 1
    slope = _grouped(gradient, groups)
    if with_silu:
        y = normalized * weight.float().reshape(of_group) + bias.float().reshape(of_group)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(silu(y.requires_grad_()), y, slope)
    scaled = slope * weight.float().reshape(of_group)
    along, against = scaled.mean((2, 3), keepdim=True), (scaled * normalized).mean((2, 3), keepdim=True)
    of_x = (scaled - along - normalized * against) * rstds[..., None, None]
    of_channels = torch.stack([slope.sum(3), (slope * normalized).sum(3)]).flatten(2)
    return of_x.reshape(x.shape).to(x.dtype, memory_format=torch.channels_last), of_channels


def _sum(one: Tensor, other: Tensor, bias: Tensor) -> Tensor:
    y = one.float() + other.float() + bias.float()[:, None, None]
    return y.to(torch.promote_types(one.dtype, other.dtype), memory_format=torch.channels_last)


def _gated(both: Tensor) -> Tensor:
    value, gate = both.chunk(2, -1)
    return value * gelu(gate)


def _gated_backward(both: Tensor, gradient: Tensor) -> Tensor:
    value, gate = both.float().chunk(2, -1)
    normal: Any = torch.distributions.Normal(0, 1)
    slope = gradient.float()
    of_gate = slope * value * (normal.cdf(gate) + gate * normal.log_prob(gate).exp())
    return torch.cat([slope * gelu(gate), of_gate], -1).to(both.dtype)
