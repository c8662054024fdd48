"""The fused kernels' functions in PyTorch's operators: their formulas, for machines without a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu
from torch.utils._python_dispatch import TorchDispatchMode


def kernels(*, wrong: str = "", factor: float = 1.0) -> dict[str, ModuleType]:
    """Return the modules by name; of one of them, `wrong`, the last function's result is off by a `factor`."""
    functions: dict[str, dict[str, Callable[..., Any]]] = {
        "group_norm": {"forward": _norm_forward, "backward": _norm_backward},
        "biased_silu": {"forward": _biased_silu, "backward": _biased_silu_backward},
        "geglu": {"forward": _gated, "backward": _gated_backward},
        "layer_norm": {"forward": _rows_forward, "backward": _rows_backward},
        "residual": {"forward": _sum},
    }
    if wrong:
        name = list(functions[wrong])[-1]
        functions[wrong][name] = _off(functions[wrong][name], factor)
    modules = {name: SimpleNamespace(**of_name) for name, of_name in functions.items()}
    return {f"raycontrolnet.model.fused.{name}": cast("ModuleType", module) for name, module in modules.items()}


def use_stand_ins(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Let the fused layers run these in place of the kernels; options as of `kernels`."""
    for name, module in kernels(**options).items():
        for function, stand_in in vars(module).items():
            monkeypatch.setattr(f"{name}.{function}", stand_in)


class Calls(TorchDispatchMode):
    """The names of the operators that run, with the number of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _off(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """Return the function whose first result is multiplied."""

    def off(*arguments: Any, **options: Any) -> Any:
        found = function(*arguments, **options)
        return (found[0] * factor, *found[1:]) if isinstance(found, tuple) else found * factor

    return off


def _means(values: Tensor, groups: int) -> Tensor:
    """Return the means of images' groups, for each channel, [B, C, 1, 1]."""
    channels = values.shape[1]
    of_groups = values.mean((2, 3)).unflatten(1, (groups, -1)).mean(2)
    return of_groups[:, torch.arange(channels) // (channels // groups), None, None]


def _norm_forward(
    x: Tensor,
    moves: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    dtype: torch.dtype,
    *,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    x = x.float()
    move = torch.zeros(()) if moves is None else moves.float()[:, :, None, None]
    mean = _means(x + move, groups)
    rstd = (_means((x + move - mean).square(), groups) + eps).rsqrt()
    mean = mean - move
    scale = rstd * weight.float()[:, None, None]
    shift = bias.float()[:, None, None] - mean * scale
    y = x * scale + shift
    if silu:
        y = y * y.sigmoid()
    return y.to(dtype, memory_format=torch.channels_last), torch.stack([scale, shift, mean, rstd], 1).flatten(2)


def _norm_backward(
    x: Tensor, gradient: Tensor, rest: Tensor | None, coefficients: Tensor, groups: int, *, silu: bool
) -> tuple[Tensor, Tensor]:
    scale, shift, mean, rstd = coefficients[..., None, None].unbind(1)
    slope = gradient.float()
    if silu:
        y = x.float() * scale + shift
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(torch.nn.functional.silu(y.requires_grad_()), y, slope)
    normalized, scaled = (x.float() - mean) * rstd, slope * scale
    of_x = scaled - _means(scaled, groups) - normalized * _means(scaled * normalized, groups)
    of_channels = torch.stack([slope.sum((2, 3)), (slope * normalized).sum((2, 3))], 1)
    of_x = of_x if rest is None else of_x + rest.float()
    return of_x.to(x.dtype, memory_format=torch.channels_last), of_channels


def _rows_forward(
    x: Tensor, other: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x if other is None else x + other
    variances, means = torch.var_mean(x.float(), -1, correction=0)
    rstds = (variances + eps).rsqrt()
    return x, ((x - means[..., None]) * rstds[..., None] * weight + bias).to(dtype), means, rstds


def _rows_backward(
    x: Tensor, gradient: Tensor, rest: Tensor | None, means: Tensor, rstds: Tensor, weight: Tensor, *, of_weights: bool
) -> tuple[Tensor, Tensor | None]:
    normalized, slope = (x - means[..., None]) * rstds[..., None], gradient.float()
    scaled = slope * weight
    along, against = scaled.mean(-1, keepdim=True), (scaled * normalized).mean(-1, keepdim=True)
    of_x = (scaled - along - normalized * against) * rstds[..., None]
    of_x = (of_x if rest is None else of_x + rest).to(x.dtype)
    return of_x, torch.stack([slope, slope * normalized]).flatten(1, -2).sum(1) if of_weights else None


def _sum(one: Tensor, other: Tensor, bias: Tensor) -> Tensor:
    y = one.float() + other.float() + bias.float()[:, None, None]
    return y.to(torch.promote_types(one.dtype, other.dtype), memory_format=torch.channels_last)


def _biased_silu(x: Tensor, bias: Tensor) -> Tensor:
    value = x.float() + bias.float()[:, None, None]
    return (value * value.sigmoid()).to(x.dtype, memory_format=torch.channels_last)


def _biased_silu_backward(x: Tensor, gradient: Tensor, bias: Tensor, *, of_bias: bool) -> tuple[Tensor, Tensor | None]:
    value = x.float() + bias.float()[:, None, None]
    sigmoid = value.sigmoid()
    of_x = gradient.float() * sigmoid * (1 + value * (1 - sigmoid))
    return of_x.to(x.dtype, memory_format=torch.channels_last), of_x.sum((0, 2, 3)) if of_bias else None


def _gated(both: Tensor) -> Tensor:
    value, gate = both.chunk(2, -1)
    return value * gelu(gate)


def _gated_backward(both: Tensor, gradient: Tensor) -> Tensor:
    value, gate = both.float().chunk(2, -1)
    normal: Any = torch.distributions.Normal(0, 1)
    slope = gradient.float()
    of_gate = slope * value * (normal.cdf(gate) + gate * normal.log_prob(gate).exp())
    return torch.cat([slope * gelu(gate), of_gate], -1).to(both.dtype)
