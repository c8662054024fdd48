"""The base model with a ControlNet: loaded, copied, frozen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.base import Base, loaded, read_base

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel


@dataclass
class Components(Base):
    """All models of a training step or a validation image; all but `controlnet` are frozen."""

    controlnet: ControlNetModel
    """fp32, trained."""


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
    base = read_base(model, dtype=dtype, token=token)
    if controlnet_path:
        controlnet = load_controlnet(controlnet_path)
    elif model.controlnet_model_name_or_path:
        controlnet = _named_controlnet(model, base.unet, token, controlnet_flag)
    else:  # before the UNet's weights are rounded
        controlnet = _copied_controlnet(base.unet, seed)
    _make_ready(base, device=device, dtype=dtype, vae_device=vae_device or device)
    controlnet.requires_grad_(True).train().to(device)
    return Components(**vars(base), controlnet=controlnet)


def _make_ready(base: Base, *, device: torch.device, dtype: torch.dtype, vae_device: torch.device) -> None:
    """Freeze the base model; bring it to its devices, precision and memory layout."""
    for module in base.frozen():
        module.requires_grad_(False).eval().to(vae_device if module is base.vae else device)
    if dtype != torch.float32:
        base.unet.to(dtype)
    # Convolutions are faster in this layout: 11% of a step on a CPU (tests/benchmarks/RESULTS.md). The ControlNet's
    # activations follow it; its weights stay as they are saved.
    base.unet.to(memory_format=torch.channels_last)


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
    for name in ("cross_attention_dim", "block_out_channels", "layers_per_block"):
        own, wanted = (_listed(module.config[name]) for module in (controlnet, unet))
        if own != wanted:
            raise UserError(
                f"--{flag}={name_or_path}: made for another base model ({name} {own}, the base model's UNet has "
                f"{wanted})"
            )
    return controlnet


def _copied_controlnet(unet: UNet2DConditionModel, seed: int) -> ControlNetModel:
    from diffusers import ControlNetModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ControlNetModel.from_unet(unet)


def _listed(value: Any) -> Any:
    """Return a tuple as a list, which it becomes in a file."""
    return list(value) if isinstance(value, tuple) else value


def with_controlnet(components: Components, controlnet: ControlNetModel) -> Components:
    """Return the same frozen models with another ControlNet."""
    return replace(components, controlnet=controlnet)
