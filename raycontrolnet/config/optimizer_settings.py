"""The settings of the averages of the weights. They are declared as in settings.py."""

from __future__ import annotations

from dataclasses import dataclass

from raycontrolnet.config.declare import setting
from raycontrolnet.config.rules import Problems, problem_of

EMA_DECAY = 0.9999


@dataclass(frozen=True, kw_only=True)
class AveragesConfig:
    """Averages: an average of the weights over the updates (EMA)."""

    use_ema: bool = setting(False, sweepable=True)
    """Average the ControlNet's weights over the updates; the averages are measured, drawn with and exported."""
    ema_decay: float = setting(EMA_DECAY, sweepable=True)
    """Largest decay of the averages, in [0, 1); after update n it is at most n / (n + 9)."""

    def problems(self) -> Problems:
        if not 0 <= self.ema_decay < 1:
            yield problem_of(self, "ema_decay", "must be in [0, 1)")
        elif self.ema_decay != EMA_DECAY and not self.use_ema:
            yield problem_of(self, "ema_decay", "has no effect without --use_ema; add it, or leave this out")
