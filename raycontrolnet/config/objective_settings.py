"""The settings of the objective: the loss, its weights, and the draws of noise and timesteps. As in settings.py.

Every default is the plain objective, which held-out rows are always measured by: `PLAIN`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raycontrolnet.config.declare import setting
from raycontrolnet.config.rules import Problems, above_zero, one_of, problem_of

LOSSES = ("mse", "huber")
TIMESTEP_SAMPLINGS = ("uniform", "logit_normal", "high_noise")
ZERO_SNR = "rescale_betas_zero_snr"
HUBER_DELTAS = (1e-6, 1e6)
"""Smallest and largest delta, whose squares fp32 holds."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Objective: the training loss. Held-out rows are measured by plain MSE at fixed timesteps in any case."""

    loss: str = setting("mse", sweepable=True, decides="training loss")
    """mse, or huber (pseudo-Huber), which outliers sway less; val_loss and control_gap stay MSE."""
    huber_delta: float = setting(0.1, sweepable=True, decides="training loss")
    """Error from which --loss huber grows linearly instead of quadratically (huber_c in other trainers)."""
    snr_gamma: float | None = setting(None, sweepable=True, decides="training loss")
    """Min-SNR weights of the training loss with this gamma, such as 5; val_loss and control_gap are not weighted."""
    timestep_sampling: str | None = setting(None, sweepable=True, decides="training loss")
    """uniform, logit_normal or high_noise; by default as the base model is trained, for Stable Diffusion uniform.
    val_loss and control_gap are measured at timesteps spread evenly."""
    logit_mean: float = setting(0.0, sweepable=True, decides="training loss")
    """Mean of logit_normal: above 0 there is more noise, below 0 less."""
    logit_std: float = setting(1.0, sweepable=True, decides="training loss")
    """Standard deviation of logit_normal, above 0: the smaller, the closer timesteps are to the mean."""
    high_noise_power: float = setting(3.0, sweepable=True, decides="training loss")
    """Power of high_noise, at least 1 (uniform): the larger, the more noise."""
    noise_offset: float = setting(0.0, sweepable=True, decides="training loss")
    """Add this much noise that is the same all over a channel, such as 0.1; not where val_loss is measured."""
    input_perturbation: float = setting(0.0, sweepable=True, decides="training loss")
    """Add this much more noise to the model's input, not to its target, such as 0.1; not where val_loss is measured."""
    rescale_betas_zero_snr: bool = setting(False, sweepable=True, decides="training loss")
    """Rescale the noise schedule so that the last timestep is pure noise, for bases that predict the velocity. The only
    one of these that val_loss depends on, as it is measured with the schedule that images are drawn with."""

    def problems(self) -> Problems:
        yield from one_of(self, "loss", LOSSES)
        yield from one_of(self, "timestep_sampling", TIMESTEP_SAMPLINGS)
        low, high = HUBER_DELTAS
        if not low <= self.huber_delta <= high:
            yield problem_of(self, "huber_delta", f"must be in [{low:g}, {high:g}]")
        yield from above_zero(self, "snr_gamma", "logit_std")
        for name in ("noise_offset", "input_perturbation"):
            if not 0 <= getattr(self, name) < math.inf:
                yield problem_of(self, name, "must be a number of at least 0")
        if not math.isfinite(self.logit_mean):
            yield problem_of(self, "logit_mean", "must be a finite number")
        if not 1 <= self.high_noise_power < math.inf:
            yield problem_of(self, "high_noise_power", "must be a number of at least 1; 1 is uniform")


PLAIN = ObjectiveConfig()
"""MSE without weights, at the base model's own timesteps and noise."""
