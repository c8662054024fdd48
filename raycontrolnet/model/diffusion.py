"""The mathematics of the training objective: noise, target and loss.

Torch alone: no models, no configuration, no randomness of its own. The notation is that of DDPM (Ho et al. 2020,
arXiv:2006.11239) and progressive distillation (Salimans & Ho 2022, arXiv:2202.00512): x_t = a_t x + s_t noise with
a_t = sqrt(alphas_cumprod[t]) and s_t = sqrt(1 - alphas_cumprod[t]).
"""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction")
MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0
"""Bounds of the log-variance, as in diffusers' DiagonalGaussianDistribution."""


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Return a sample of the VAE's diagonal Gaussian posterior, in the dtype of `noise`; all [B, C, h, w]."""
    return mean.to(noise) + torch.exp(0.5 * logvar.to(noise).clamp(MIN_LOGVAR, MAX_LOGVAR)) * noise


def add_noise(latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return x_t (DDPM, eq. 4) for latents and noise fp32 [B, C, h, w], and `alphas_cumprod` [B] at each timestep."""
    signal, sigma = _levels(alphas_cumprod, latents)
    return signal * latents + sigma * noise


def prediction_target(prediction_type: str, latents: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return the UNet's target: the noise, or the velocity v = a_t noise - s_t x (Salimans & Ho 2022, section 4).

    Raises:
        ValueError: for any other `prediction_type`.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        signal, sigma = _levels(alphas_cumprod, latents)
        return signal * noise - sigma * latents
    raise _unknown(prediction_type)


def per_sample_loss(prediction: Tensor, target: Tensor, huber_delta: float | None = None) -> Tensor:
    """Return the mean error of each sample in fp32, [B] from [B, C, h, w]: squared, or pseudo-Huber.

    Pseudo-Huber is 2 d (sqrt(x^2 + d^2) - d) of the difference x: x^2 where x is far below d, and 2 d |x| far above
    (Charbonnier et al. 1994; Song & Dhariwal 2023, arXiv:2310.14189; times 2 d as in Khrapov et al. 2024,
    arXiv:2403.16728, so that d chooses where errors count less, and not the scale of the loss).

    Args:
        huber_delta: d; None for the squared error.
    """
    squared = (prediction.float() - target.float()).pow(2)
    if huber_delta is not None:
        # The same without the difference of two nearly equal numbers.
        squared = 2 * squared / ((squared / huber_delta**2 + 1).sqrt() + 1)
    return squared.flatten(1).mean(1)


def min_snr_weights(prediction_type: str, alphas_cumprod: Tensor, gamma: float) -> Tensor:
    """Return the weight of each sample's loss, [B] as `alphas_cumprod` at each timestep.

    Min-SNR (Hang et al. 2023, arXiv:2303.09556): min(SNR, gamma) / SNR for the noise, min(SNR, gamma) / (SNR + 1) for
    the velocity, which both weight the error of the latents by min(SNR, gamma). With SNR = a / (1 - a), and finite at
    a = 0 and a = 1.

    Raises:
        ValueError: for any other `prediction_type`.
    """
    a = alphas_cumprod
    if prediction_type == "epsilon":
        return (gamma * (1 - a) / a).clamp(max=1)
    if prediction_type == "v_prediction":
        return torch.minimum(a, gamma * (1 - a))
    raise _unknown(prediction_type)


def _unknown(prediction_type: str) -> ValueError:
    return ValueError(f"prediction_type {prediction_type!r}: must be one of {', '.join(PREDICTION_TYPES)}")


def _levels(alphas_cumprod: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    level = alphas_cumprod.to(like).view(-1, *[1] * (like.dim() - 1))
    return level.sqrt(), (1 - level).sqrt()
