"""The base model with a ControlNet: loaded, checked, copied, frozen. What differs between families is in families/."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model import kinds
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.families.registry import TRAINED, denoiser_problem, family_of
from raycontrolnet.model.loading import BASE, VAE, from_pretrained, loaded, part, weights
from raycontrolnet.model.problems import mismatch
from raycontrolnet.text import error_message

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTokenizer


RESUME = "resume_from_checkpoint"
OTHER_BASE = "name the base model that it was trained on, or start anew in another --output_dir"


@dataclass
class Components:
    """All models of a training step or a validation image; all but `controlnet` are frozen."""

    family: Family
    tokenizers: tuple[CLIPTokenizer, ...]
    text_encoders: tuple[Any, ...]
    """One for each tokenizer."""
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    controlnet: ControlNetModel
    """fp32, trained."""

    def frozen(self) -> tuple[torch.nn.Module, ...]:
        """Return the modules that training does not change."""
        return *self.text_encoders, self.vae, self.unet

    def with_own_tokenizers(self) -> Components:
        """Return the components with copies of the tokenizers, of which padding and truncation are states."""
        return replace(self, tokenizers=copy.deepcopy(self.tokenizers))


def load_components(
    model: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    token: str | None = None,
    controlnet_path: str | None = None,
    controlnet_flag: str = "controlnet_model_name_or_path",
    vae_device: torch.device | None = None,
) -> Components:
    """Load the base model, and make or load the ControlNet.

    Args:
        dtype: precision of the frozen models. The ControlNet is fp32 whatever its files hold.
        seed: decides the ControlNet's conditioning embedding, the one part without weights to copy.
        token: for private models on the Hub.
        controlnet_path: a checkpoint's ControlNet, instead of the settings'.
        controlnet_flag: the flag that names the settings' ControlNet, for messages.
        vae_device: where the VAE is kept, if not on `device`.

    Raises:
        UserError: if a part is missing or unreadable, or the model is of a kind that cannot be trained.
    """
    family = _family(model, token)
    unet, noise_scheduler = family.load_denoiser(model, token)
    if problem := kinds.scheduler_problem(noise_scheduler.config):
        raise _unsuitable(model, problem)
    tokenizers, text_encoders = family.load_text(model, token, dtype)
    vae_dtype = family.vae_dtype(dtype, named=model.pretrained_vae_model_name_or_path is not None)
    vae = load_vae(model, dtype=vae_dtype, token=token)
    if controlnet_path:
        controlnet = load_controlnet(controlnet_path, family, RESUME)
        if problem := mismatch(controlnet.config, unet.config):
            raise UserError(f"--{RESUME}={controlnet_path}: {problem}; {OTHER_BASE}")
    elif model.controlnet_model_name_or_path:
        controlnet = _named_controlnet(model, family, unet, token, controlnet_flag)
    else:  # before the UNet's weights are rounded
        controlnet = _copied_controlnet(model, family, unet, seed)
    # Convolutions are faster in this layout: 11% of a step on a CPU (tests/benchmarks/RESULTS.md). The ControlNet's
    # activations follow it; its weights stay as they are saved. Rounded before it is moved, which needs half the room.
    unet.to(dtype=dtype, memory_format=torch.channels_last)
    for module in (*text_encoders, vae, unet):
        module.requires_grad_(False).eval().to((vae_device or device) if module is vae else device)
    controlnet.requires_grad_(True).train().to(device)
    return Components(family, tokenizers, text_encoders, vae, unet, noise_scheduler, controlnet)


def _unsuitable(model: ModelConfig, problem: str) -> UserError:
    return UserError(f"--{BASE}={model.pretrained_model_name_or_path}: {problem}")


def _family(model: ModelConfig, token: str | None) -> Family:
    """Return the family of the base model, by its small files.

    Raises:
        UserError: if they are missing, or it is of a kind that cannot be trained.
    """
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = part(model, token, UNet2DConditionModel.load_config, subfolder="unet")
    family, problem = family_of(config), denoiser_problem(config)
    if problem or family is None:
        raise _unsuitable(model, problem or f"is of no family that is known; {TRAINED}")
    return family


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


def load_controlnet(
    name_or_path: str, family: Family, flag: str = "controlnet_model_name_or_path", **options: Any
) -> ControlNetModel:
    """Load a ControlNet from a folder or the Hub, in fp32."""
    cls = family.controlnet_class()
    options |= {"torch_dtype": torch.float32, "use_safetensors": True}
    controlnet = loaded(flag, name_or_path, partial(from_pretrained, cls), **options)
    # Copied, because MKL rounds differently at the odd addresses of a mapped file, and a resumed run must compute what
    # it would have computed.
    for weight in controlnet.parameters():
        weight.data = weight.data.clone()
    return controlnet


def _named_controlnet(
    model: ModelConfig, family: Family, unet: UNet2DConditionModel, token: str | None, flag: str
) -> ControlNetModel:
    name_or_path = model.controlnet_model_name_or_path
    assert name_or_path
    controlnet = load_controlnet(name_or_path, family, flag, cache_dir=model.cache_dir, token=token)
    if problem := mismatch(controlnet.config, unet.config):
        raise UserError(f"--{flag}={name_or_path}: {problem}")
    return controlnet


def _copied_controlnet(model: ModelConfig, family: Family, unet: UNet2DConditionModel, seed: int) -> ControlNetModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return family.controlnet_class().from_unet(unet)
        except (ValueError, RuntimeError, AttributeError) as error:
            problem = f"its UNet cannot be copied into a ControlNet ({error_message(error, 100)}); {TRAINED}"
            raise _unsuitable(model, problem) from error
