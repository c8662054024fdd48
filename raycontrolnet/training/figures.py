"""The figures of an update that the workers average, on their way from the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raycontrolnet.model.batch import to_device

if TYPE_CHECKING:
    from accelerate import Accelerator


class OnItsWay:
    """Figures that are copied from the device beside its work: reading them later waits for that copy alone."""

    def __init__(self, value: Tensor):
        self._value, self._copied = value, None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """Return the figures."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value.tolist()


def mean_over_workers(
    losses: Sequence[Tensor], weight: float, seen: Sequence[float], accelerator: Accelerator
) -> tuple[Tensor, OnItsWay]:
    """Return an update's loss, on the device, and what workers have `seen`: means over these, in one message.

    Args:
        losses: of this worker's micro-steps.
        weight: of this worker's loss in the mean; see `Share`.
    """
    notices = to_device(torch.tensor(seen), losses[0].device)
    figures = torch.cat([(torch.stack(list(losses)).mean() * weight)[None], notices])
    loss, *_ = figures = accelerator.reduce(figures, reduction="mean")
    return loss, OnItsWay(figures[1:])
