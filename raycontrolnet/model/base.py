"""The base model, a Stable Diffusion 1.x or 2.x: read from its files, and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.diffusion import PREDICTION_TYPES
from raycontrolnet.text import error_message

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

Loaded = TypeVar("Loaded")


@dataclass
class Base:
    """The models that training does not change."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler

    def frozen(self) -> tuple[torch.nn.Module, ...]:
        """Return the modules, all of them frozen."""
        return self.text_encoder, self.vae, self.unet


def read_base(model: ModelConfig, *, dtype: torch.dtype, token: str | None = None) -> Base:
    """Read the base model on the CPU, in `dtype` but for the UNet, which is fp32 for a ControlNet to be copied from.

    Raises:
        UserError: if a part is missing or unreadable, or the model is of a kind that cannot be trained.
    """
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    base = model.pretrained_model_name_or_path
    hub: dict[str, Any] = {"revision": model.revision, "cache_dir": model.cache_dir, "token": token}
    weights = hub | {"variant": model.variant}

    def part(load: Callable[..., Loaded], subfolder: str, **options: Any) -> Loaded:
        return loaded("pretrained_model_name_or_path", base, load, subfolder=subfolder, **options)

    noise_scheduler = part(DDPMScheduler.from_pretrained, "scheduler", **hub)
    unet = part(UNet2DConditionModel.from_pretrained, "unet", torch_dtype=torch.float32, **weights)
    _check_trainable(base, unet, noise_scheduler)
    if model.tokenizer_name:
        tokenizer = loaded("tokenizer_name", model.tokenizer_name, CLIPTokenizer.from_pretrained, **hub)
    else:
        tokenizer = part(CLIPTokenizer.from_pretrained, "tokenizer", **hub)
    text_encoder = part(CLIPTextModel.from_pretrained, "text_encoder", dtype=dtype, **weights)
    _check_tokenizer(model, tokenizer, text_encoder)
    return Base(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=load_vae(model, dtype=dtype, token=token),
        unet=unet,
        noise_scheduler=noise_scheduler,
    )


def load_vae(model: ModelConfig, *, dtype: torch.dtype, token: str | None = None) -> AutoencoderKL:
    """Read the base model's VAE on the CPU.

    Raises:
        UserError: if it is missing or unreadable.
    """
    from diffusers import AutoencoderKL

    return loaded(
        "pretrained_model_name_or_path",
        model.pretrained_model_name_or_path,
        AutoencoderKL.from_pretrained,
        subfolder="vae",
        torch_dtype=dtype,
        revision=model.revision,
        variant=model.variant,
        cache_dir=model.cache_dir,
        token=token,
    )


def loaded(flag: str, name: str, load: Callable[..., Loaded], **options: Any) -> Loaded:
    """Call `load(name, **options)`; turn the libraries' many errors into one that names the flag."""
    try:
        return load(name, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        what = f" ({options['subfolder']})" if "subfolder" in options else ""
        reason = error_message(error, 300)
        raise UserError(
            f"--{flag}={name}: cannot be loaded{what}: {reason}. Give a folder in diffusers' layout or a Hub id; "
            "a private one needs --hub_token or `hf auth login`"
        ) from error


def _check_trainable(base: str, unet: UNet2DConditionModel, noise_scheduler: DDPMScheduler) -> None:
    prediction_type = noise_scheduler.config["prediction_type"]
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(
            f"--pretrained_model_name_or_path={base}: its scheduler's prediction_type is {prediction_type!r}; "
            f"only {' and '.join(PREDICTION_TYPES)} can be trained"
        )
    if unet.config["in_channels"] != 4 or unet.config["addition_embed_type"] is not None:
        raise UserError(
            f"--pretrained_model_name_or_path={base}: not a text-to-image Stable Diffusion 1.x or 2.x model "
            f"(UNet with {unet.config['in_channels']} input channels, addition_embed_type "
            f"{unet.config['addition_embed_type']}); inpainting and SDXL models cannot be trained"
        )


def _check_tokenizer(model: ModelConfig, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    # Of a folder without a tokenizer, Transformers makes an empty one, of endless length.
    most = text_encoder.config.max_position_embeddings
    if tokenizer.model_max_length > most:
        flag = "tokenizer_name" if model.tokenizer_name else "pretrained_model_name_or_path"
        raise UserError(
            f"--{flag}={getattr(model, flag)}: its tokenizer is missing or of another model (model_max_length "
            f"{tokenizer.model_max_length:.4g}, the text encoder takes {most} tokens)"
        )
