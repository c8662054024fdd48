"""The base model, a Stable Diffusion 1.x or 2.x, with a ControlNet: loaded, checked, copied, frozen."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model import kinds
from raycontrolnet.model.problems import BASE, mismatch
from raycontrolnet.text import error_message

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

Loaded = TypeVar("Loaded")


@dataclass
class Components:
    """All models of a training step or a validation image; all but `controlnet` are frozen."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    controlnet: ControlNetModel
    """fp32, trained."""

    def frozen(self) -> tuple[torch.nn.Module, ...]:
        """Return the modules that training does not change."""
        return self.text_encoder, self.vae, self.unet


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
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    noise_scheduler = _part(model, token, DDPMScheduler.from_pretrained, subfolder="scheduler")
    unet_options: dict[str, Any] = {"subfolder": "unet", "variant": model.variant, "torch_dtype": torch.float32}
    unet = _part(model, token, UNet2DConditionModel.from_pretrained, **unet_options)
    _check_trainable(model, unet, noise_scheduler)
    text_options: dict[str, Any] = {"subfolder": "text_encoder", "variant": model.variant, "dtype": dtype}
    text_encoder = _part(model, token, CLIPTextModel.from_pretrained, **text_options)
    tokenizer = _load_tokenizer(model, token, text_encoder)
    vae = load_vae(model, dtype=dtype, token=token)
    if controlnet_path:
        controlnet = load_controlnet(controlnet_path)
    elif model.controlnet_model_name_or_path:
        controlnet = _named_controlnet(model, unet, token, controlnet_flag)
    else:  # before the UNet's weights are rounded
        controlnet = _copied_controlnet(model, unet, seed)
    for module in (text_encoder, vae, unet):
        module.requires_grad_(False).eval().to((vae_device or device) if module is vae else device)
    # Convolutions are faster in this layout: 11% of a step on a CPU (tests/benchmarks/RESULTS.md). The ControlNet's
    # activations follow it; its weights stay as they are saved.
    unet.to(dtype=dtype, memory_format=torch.channels_last)
    controlnet.requires_grad_(True).train().to(device)
    return Components(tokenizer, text_encoder, vae, unet, noise_scheduler, controlnet)


def load_vae(model: ModelConfig, *, dtype: torch.dtype, token: str | None = None) -> AutoencoderKL:
    """Load the base model's VAE on the CPU.

    Raises:
        UserError: if it is missing or unreadable.
    """
    from diffusers import AutoencoderKL

    weights: dict[str, Any] = {"subfolder": "vae", "variant": model.variant, "torch_dtype": dtype}
    return _part(model, token, AutoencoderKL.from_pretrained, **weights)


def _part(
    model: ModelConfig, token: str | None, load: Callable[..., Loaded], flag: str = BASE, **options: Any
) -> Loaded:
    """Load a part of the model that the setting `flag` names."""
    hub = {"revision": model.revision, "cache_dir": model.cache_dir, "token": token}
    return loaded(flag, getattr(model, flag), load, **hub, **options)


def loaded(flag: str, name: str, load: Callable[..., Loaded], **options: Any) -> Loaded:
    """Call `load(name, **options)`; turn the libraries' many errors into one that names the flag."""
    from safetensors import SafetensorError

    try:
        return load(name, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, UnpicklingError, EOFError) as error:
        if Path(name).is_absolute() and not Path(name).is_dir():  # the driver has made sure that it is there
            problem = f"the node {socket.gethostname()} does not see it; name a folder on storage that all nodes share"
            raise UserError(f"--{flag}={name}: {problem}") from error
        what = f" ({options['subfolder']})" if "subfolder" in options else ""
        advice = "" if Path(name).is_dir() else "; if it is private, give --hub_token or `hf auth login`"
        reason = error_message(error, 110).rstrip(".")
        raise UserError(f"--{flag}={name}: cannot be loaded{what}: {reason}{advice}") from error


def _check_trainable(model: ModelConfig, unet: UNet2DConditionModel, noise_scheduler: DDPMScheduler) -> None:
    problem = kinds.unet_problem(unet.config) or kinds.scheduler_problem(noise_scheduler.config)
    if problem:
        raise UserError(f"--{BASE}={model.pretrained_model_name_or_path}: {problem}")


def _load_tokenizer(model: ModelConfig, token: str | None, text_encoder: CLIPTextModel) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    flag, folder = ("tokenizer_name", {}) if model.tokenizer_name else (BASE, {"subfolder": "tokenizer"})
    tokenizer = _part(model, token, CLIPTokenizer.from_pretrained, flag, **folder)
    # Of a folder without a tokenizer, Transformers makes an empty one, of endless length.
    most = text_encoder.config.max_position_embeddings
    if tokenizer.model_max_length > most:
        raise UserError(
            f"--{flag}={getattr(model, flag)}: its tokenizer is missing or of another model (model_max_length "
            f"{tokenizer.model_max_length:.4g}, the text encoder takes {most} tokens)"
        )
    return tokenizer


def encode_images(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Encode images uint8 [B, H, W, 3] RGB: mean and log-variance of the VAE's posterior, [B, C, h, w] in its dtype."""
    posterior = vae.encode((images.permute(0, 3, 1, 2).float() / 127.5 - 1.0).to(vae.dtype)).latent_dist
    return posterior.mean, posterior.logvar


def load_controlnet(name_or_path: str, flag: str = "controlnet_model_name_or_path", **options: Any) -> ControlNetModel:
    """Load a ControlNet from a folder or the Hub, in fp32."""
    from diffusers import ControlNetModel

    controlnet = loaded(flag, name_or_path, ControlNetModel.from_pretrained, torch_dtype=torch.float32, **options)
    # Copied, because MKL rounds differently at the odd addresses of a mapped file, and a resumed run must compute what
    # it would have computed.
    for weight in controlnet.parameters():
        weight.data = weight.data.clone()
    return controlnet


def _named_controlnet(model: ModelConfig, unet: UNet2DConditionModel, token: str | None, flag: str) -> ControlNetModel:
    name_or_path = model.controlnet_model_name_or_path
    assert name_or_path
    controlnet = load_controlnet(name_or_path, flag, cache_dir=model.cache_dir, token=token)
    if problem := mismatch(controlnet.config, unet.config):
        raise UserError(f"--{flag}={name_or_path}: {problem}")
    return controlnet


def _copied_controlnet(model: ModelConfig, unet: UNet2DConditionModel, seed: int) -> ControlNetModel:
    from diffusers import ControlNetModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return ControlNetModel.from_unet(unet)
        except (ValueError, RuntimeError, AttributeError) as error:
            problem = f"its UNet cannot be copied into a ControlNet ({error_message(error, 100)}); {kinds.TRAINED}"
            raise UserError(f"--{BASE}={model.pretrained_model_name_or_path}: {problem}") from error
