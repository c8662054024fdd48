"""The fused kernels' functions in PyTorch's operators: their formulas, for machines without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import gelu


def kernels(*, wrong: str = "", factor: float = 1.0) -> dict[str, ModuleType]:
    """Return the modules by name; of one of them, `wrong`, the last function's result is off by a `factor`."""
    functions: dict[str, dict[str, Callable[..., Any]]] = {
        "group_norm": {"forward": _norm_forward, "backward": _norm_backward},
        "geglu": {"forward": _gated, "backward": _gated_backward},
        "layer_norm": {"forward": _rows_forward, "backward": _rows_backward},
        "residual": {"forward": _sum},
    }
    if wrong:
        name = list(functions[wrong])[-1]
        functions[wrong][name] = _off(functions[wrong][name], factor)
    modules = {name: SimpleNamespace(**of_name) for name, of_name in functions.items()}
    return {f"raycontrolnet.model.fused.{name}": cast("ModuleType", module) for name, module in modules.items()}


def _off(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """Return the function whose first result is multiplied."""

    def off(*arguments: Any, **options: Any) -> Any:
        found = function(*arguments, **options)
        return (found[0] * factor, *found[1:]) if isinstance(found, tuple) else found * factor

    return off


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
    x: Tensor, gradient: Tensor, means: Tensor, rstds: Tensor, weight: Tensor, bias: Tensor, *, silu: bool
) -> tuple[Tensor, Tensor]:
    groups = means.shape[1]
    normalized = (_grouped(x, groups) - means[..., None, None]) * rstds[..., None, None]
    of_group = 1, groups, -1, 1
    slope = _grouped(gradient, groups)
    if silu:
        y = normalized * weight.float().reshape(of_group) + bias.float().reshape(of_group)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(torch.nn.functional.silu(y.requires_grad_()), y, slope)
    scaled = slope * weight.float().reshape(of_group)
    along, against = scaled.mean((2, 3), keepdim=True), (scaled * normalized).mean((2, 3), keepdim=True)
    of_x = (scaled - along - normalized * against) * rstds[..., None, None]
    of_channels = torch.stack([slope.sum(3), (slope * normalized).sum(3)]).flatten(2)
    return of_x.reshape(x.shape).to(x.dtype, memory_format=torch.channels_last), of_channels


def _rows_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    variances, means = torch.var_mean(x.float(), -1, correction=0)
    rstds = (variances + eps).rsqrt()
    return ((x - means[..., None]) * rstds[..., None] * weight + bias).to(dtype), means, rstds


def _rows_backward(
    x: Tensor, gradient: Tensor, means: Tensor, rstds: Tensor, weight: Tensor, *, of_weights: bool
) -> tuple[Tensor, Tensor | None]:
    normalized, slope = (x - means[..., None]) * rstds[..., None], gradient.float()
    scaled = slope * weight
    along, against = scaled.mean(-1, keepdim=True), (scaled * normalized).mean(-1, keepdim=True)
    of_x = ((scaled - along - normalized * against) * rstds[..., None]).to(x.dtype)
    return of_x, torch.stack([slope, slope * normalized]).flatten(1, -2).sum(1) if of_weights else None


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
