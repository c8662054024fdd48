"""Optimizers that are nobody's, as a user may have them: their state is of kinds that PyTorch's do not have."""

from __future__ import annotations

from typing import Any

import torch


class Estimating(torch.optim.Optimizer):
    """Descent by a momentum in bfloat16, with a step size that it estimates, as Prodigy does, in the group."""

    def __init__(self, params: Any, lr: float = 1e-3, *, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "estimate": 1.0, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the weights and the estimate."""
        for group in self.param_groups:
            group["count"] += 1
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["velocity"] = torch.zeros_like(weight, dtype=torch.bfloat16)
                    state["signs"] = torch.zeros_like(weight, dtype=torch.int8)
                state["velocity"].mul_(group["momentum"]).add_(weight.grad)
                state["signs"].copy_(weight.grad.sign())
                weight.sub_(group["lr"] * group["estimate"] * (state["velocity"].float() + 1e-4 * state["signs"]))
            group["estimate"] *= 1.01


class OwnFused(torch.optim.RAdam):
    """An optimizer with an argument of PyTorch's name, which does not ask whether it is to skip an update."""

    def __init__(self, params: Any, lr: float = 1e-3, *, fused: bool = True) -> None:
        super().__init__(params, lr)
        self.defaults["fused"] = fused


class WithClosure(torch.optim.Optimizer):
    """An optimizer that calls the model itself."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class Switching(Estimating):
    """An optimizer with other weights for measuring."""

    def eval(self) -> None:
        """Switch to them."""


class Unkeepable(Estimating):
    """An optimizer whose state a checkpoint cannot hold safely."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for state in self.state.values():
            state["thing"] = Unkeepable
