"""Distributions of timesteps that every family can have: as the share of the training timesteps that lies below."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from raycontrolnet.config.objective_settings import ObjectiveConfig

if TYPE_CHECKING:
    import numpy as np

BELOW_ONE = 1 - 2**-53
LARGEST_EXPONENT = 700.0
"""Exponents above it overflow."""


def draw_fraction(rng: np.random.Generator, objective: ObjectiveConfig) -> float:
    """Draw a fraction in [0, 1) of the timesteps, where 1 is pure noise, as `timestep_sampling` says."""
    if objective.timestep_sampling == "logit_normal":
        return logit_normal(rng.standard_normal(), objective.logit_mean, objective.logit_std)
    if objective.timestep_sampling == "high_noise":
        return high_noise(rng.random(), objective.high_noise_power)
    raise ValueError(f"timestep_sampling {objective.timestep_sampling!r}: has no fractions of its own")


def logit_normal(normal: float, mean: float, std: float) -> float:
    """Return the logit-normal number of a standard normal one (Esser et al. 2024, arXiv:2403.03206, eq. 19)."""
    exponent = min(LARGEST_EXPONENT, -(mean + std * normal))
    return min(BELOW_ONE, 1 / (1 + math.exp(exponent)))


def high_noise(uniform: float, power: float) -> float:
    """Return 1 - u^power of a uniform number u in [0, 1): half of them are above 1 - 2^-power.

    With power 3 it is T2I-Adapter's cubic sampling (Mou et al. 2023, arXiv:2302.08453, section 3.4).
    """
    return min(BELOW_ONE, 1 - uniform**power)
