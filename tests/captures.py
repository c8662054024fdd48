"""Stand-in of CUDA graphs on the CPU: a replay does the function again, and checks what a graph would keep in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raycontrolnet.model.graphs import GradientGraphs


class Captures:
    """Stand-in of `capture`, which counts, and checks that what is replayed still lies where it was captured."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0
        self.error: Exception | None = None
        self.weights: list[torch.nn.Parameter] = []

    def __call__(self, function: Callable[[], Tensor], _pool: Any) -> tuple[Callable[[], None], Tensor]:
        self.captured += 1
        if self.error:
            raise self.error
        loss = torch.full((), torch.nan)
        places = self.places()
        assert places

        def replay() -> None:
            self.replayed += 1
            assert self.places() == places
            loss.copy_(function())

        return replay, loss

    def places(self) -> list[tuple[int, int]]:
        return [(each.data_ptr(), each.grad.data_ptr()) for each in self.weights if each.grad is not None]

    def graphs(self, weights: Sequence[torch.nn.Parameter]) -> GradientGraphs:
        self.weights = list(weights)
        return GradientGraphs(self.weights)
