"""The VAE: loaded, and its encoder on images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.loading import VAE, weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def load_vae(model: ModelConfig, *, dtype: torch.dtype, token: str | None = None) -> AutoencoderKL:
    """Load the VAE that the settings name, or else the base model's, on the CPU.

    Raises:
        UserError: if it is missing or unreadable.
    """
    from diffusers import AutoencoderKL

    if model.pretrained_vae_model_name_or_path is None:
        return weights(model, token, AutoencoderKL, dtype, "vae", variant=model.variant)
    try:
        return weights(model, token, AutoencoderKL, dtype, flag=VAE, variant=model.variant)
    except UserError:
        if model.variant is None:
            raise
    # The variant is the base model's: few VAEs that come alone have it.
    return weights(model, token, AutoencoderKL, dtype, flag=VAE)


def encode_images(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Encode images uint8 [B, H, W, 3] RGB: mean and log-variance of the VAE's posterior, [B, C, h, w] in its dtype."""
    posterior = vae.encode((images.permute(0, 3, 1, 2).float() / 127.5 - 1.0).to(vae.dtype)).latent_dist
    return posterior.mean, posterior.logvar
