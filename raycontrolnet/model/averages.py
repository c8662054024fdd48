"""Averages of the ControlNet's trained weights over the updates (EMA), by diffusers' EMAModel, in fp32.

After update n:

    average <- d(n) x average + (1 - d(n)) x weight,  d(n) = min(--ema_decay, n / (n + 9)),  d(1) = 0

So a short run averages over about its last tenth, and the weights that it began with have no part in it. An update that
fp16's loss scaler skips is none of them; one that `--on_nan skip` leaves out counts, with the weights unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


def trained_weights(controlnet: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return name -> weight, for those that have gradients."""
    return {name: weight for name, weight in controlnet.named_parameters() if weight.requires_grad}


def new_averages(controlnet: torch.nn.Module, decay: float) -> EMAModel:
    """Return averages that begin with the weights as they are, on their device and in their layout."""
    from diffusers.training_utils import EMAModel

    return EMAModel(trained_weights(controlnet).values(), decay=decay, foreach=True)


def update_averages(averages: EMAModel, controlnet: torch.nn.Module) -> None:
    """Take the weights after an update into the averages."""
    averages.step(trained_weights(controlnet).values())


@contextmanager
def averaged(controlnet: torch.nn.Module, averages: EMAModel | None) -> Iterator[None]:
    """Let the ControlNet have the averages as its weights for a while, if there are any; nothing is copied."""
    _swap(controlnet, averages)
    try:
        yield
    finally:
        _swap(controlnet, averages)


def _swap(controlnet: torch.nn.Module, averages: EMAModel | None) -> None:
    if averages is None:
        return
    weights = list(trained_weights(controlnet).values())
    trained = [weight.data for weight in weights]
    for weight, average in zip(weights, averages.shadow_params, strict=True):
        weight.data = average
    averages.shadow_params = trained


def with_averages(
    weights: Mapping[str, torch.Tensor], controlnet: torch.nn.Module, averages: EMAModel
) -> dict[str, torch.Tensor]:
    """Return a ControlNet's `weights` with averages in place of those that are trained."""
    return {**weights, **dict(zip(trained_weights(controlnet), averages.shadow_params, strict=True))}


def load_averages(
    averages: EMAModel, controlnet: torch.nn.Module, saved: Mapping[str, torch.Tensor], updates: int
) -> None:
    """Let the averages be those that were `saved` after so many `updates` were taken into them.

    Args:
        averages: of `controlnet`; they keep device and layout.
        saved: a ControlNet's weights, in fp32.
        updates: of which an update skipped by fp16's loss scaler is none.

    Raises:
        KeyError, RuntimeError: they are another ControlNet's.
    """
    for name, average in zip(trained_weights(controlnet), averages.shadow_params, strict=True):
        average.copy_(saved[name])
    averages.optimization_step = updates
