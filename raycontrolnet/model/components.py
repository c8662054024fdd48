"""The models of Stable Diffusion 1.x and 2.x with a ControlNet: loading, copying, freezing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from raycontrolnet.errors import UserError
from raycontrolnet.model.diffusion import PREDICTION_TYPES
from raycontrolnet.settings import ModelConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

Loaded = TypeVar("Loaded")
Module = TypeVar("Module", bound=torch.nn.Module)


@dataclass
class Components:
    """Everything that a training step and a validation image need; all but `controlnet` frozen."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    noise_scheduler: DDPMScheduler
    controlnet: ControlNetModel
    """fp32, trained."""

    def frozen(self) -> tuple[torch.nn.Module, ...]:
        return self.text_encoder, self.vae, self.unet


def working_precision(mixed_precision: str | None) -> torch.dtype:
    """The dtype of the frozen models."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision or "no", torch.float32)


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
    """Load the base model and make or load the ControlNet.

    Args:
        vae_device: where the VAE waits, if not on `device`.
        dtype: of the frozen models. The ControlNet is fp32 whatever its files hold.
        seed: of the ControlNet's conditioning embedding, the one part without weights to copy.
        token: for private models on the Hub.
        controlnet_path: a checkpoint's ControlNet, instead of the settings'.
        controlnet_flag: where the user named the settings' ControlNet.

    Raises:
        UserError: if a part is missing or unreadable, or the model is of a kind that cannot be trained.
    """
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    base = model.pretrained_model_name_or_path
    hub: dict[str, Any] = {"revision": model.revision, "cache_dir": model.cache_dir, "token": token}
    weights = hub | {"variant": model.variant}

    def part(load: Callable[..., Loaded], subfolder: str, **options: Any) -> Loaded:
        return _loading("pretrained_model_name_or_path", base, load, subfolder=subfolder, **options)

    noise_scheduler = part(DDPMScheduler.from_pretrained, "scheduler", **hub)
    # fp32 first: the ControlNet is copied from the UNet's weights as they are stored, not rounded.
    unet = part(UNet2DConditionModel.from_pretrained, "unet", torch_dtype=torch.float32, **weights)
    _check_trainable(base, unet, noise_scheduler)
    if model.tokenizer_name:
        tokenizer = _loading("tokenizer_name", model.tokenizer_name, CLIPTokenizer.from_pretrained, **hub)
    else:
        tokenizer = part(CLIPTokenizer.from_pretrained, "tokenizer", **hub)
    text_encoder = part(CLIPTextModel.from_pretrained, "text_encoder", dtype=dtype, **weights)
    _check_tokenizer(model, tokenizer, text_encoder)
    components = Components(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=load_vae(model, dtype=dtype, token=token),
        unet=unet,
        noise_scheduler=noise_scheduler,
        controlnet=load_controlnet(controlnet_path)
        if controlnet_path
        else _make_controlnet(model, unet, seed, token, controlnet_flag),
    )
    for module in components.frozen():
        module.requires_grad_(False).eval().to(vae_device if vae_device and module is components.vae else device)
    if dtype != torch.float32:
        unet.to(dtype)
    # The layout that convolutions want: 11% off a step on a CPU (tests/benchmarks/RESULTS.md). The ControlNet's
    # activations follow, its weights stay as they are saved.
    unet.to(memory_format=torch.channels_last)
    on_device(unet, device)
    on_device(components.controlnet.requires_grad_(True).train(), device)
    return components


def on_device(module: Module, device: torch.device) -> Module:
    """A UNet or ControlNet on `device`, computing in the way that is fastest there."""
    from raycontrolnet.model.attention import pad_narrow_heads  # which imports diffusers

    if device.type == "cpu":
        pad_narrow_heads(module)
    return module.to(device)


def load_vae(model: ModelConfig, *, dtype: torch.dtype, token: str | None = None) -> AutoencoderKL:
    """The base model's VAE, on the CPU.

    Raises:
        UserError: if it is missing or unreadable.
    """
    from diffusers import AutoencoderKL

    return _loading(
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


def encode_images(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the VAE's posterior, [B, C, h, w] in its dtype, of images uint8 [B, H, W, 3] RGB."""
    posterior = vae.encode((images.permute(0, 3, 1, 2).float() / 127.5 - 1.0).to(vae.dtype)).latent_dist
    return posterior.mean, posterior.logvar


def load_controlnet(name_or_path: str, flag: str = "controlnet_model_name_or_path", **options: Any) -> ControlNetModel:
    """A ControlNet from a folder or the Hub, its weights raised to fp32."""
    from diffusers import ControlNetModel

    controlnet = _loading(flag, name_or_path, ControlNetModel.from_pretrained, torch_dtype=torch.float32, **options)
    # Off the mapped file, where they lie at odd addresses: MKL rounds differently there, and a run that goes on must
    # compute what it would have computed.
    for weight in controlnet.parameters():
        weight.data = weight.data.clone()
    return controlnet


def _make_controlnet(
    model: ModelConfig, unet: UNet2DConditionModel, seed: int, token: str | None, flag: str
) -> ControlNetModel:
    from diffusers import ControlNetModel

    if name_or_path := model.controlnet_model_name_or_path:
        controlnet = load_controlnet(name_or_path, flag, cache_dir=model.cache_dir, token=token)
        for name in ("cross_attention_dim", "block_out_channels", "layers_per_block"):
            own, wanted = (_listed(module.config[name]) for module in (controlnet, unet))
            if own != wanted:
                raise UserError(
                    f"--{flag}={name_or_path}: made for another base model ({name} {own}, the base model's UNet has "
                    f"{wanted})"
                )
        return controlnet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ControlNetModel.from_unet(unet)


def _listed(value: Any) -> Any:
    """Tuples as lists, which they become in files."""
    return list(value) if isinstance(value, tuple) else value


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
    """Transformers makes an empty tokenizer, of endless length, of a folder without one."""
    most = text_encoder.config.max_position_embeddings
    if tokenizer.model_max_length > most:
        flag = "tokenizer_name" if model.tokenizer_name else "pretrained_model_name_or_path"
        raise UserError(
            f"--{flag}={getattr(model, flag)}: its tokenizer is missing or of another model (model_max_length "
            f"{tokenizer.model_max_length:.4g}, the text encoder takes {most} tokens)"
        )


def _loading(flag: str, name: str, load: Callable[..., Loaded], **options: Any) -> Loaded:
    """`load(name, **options)`, with the libraries' many errors turned into one that names the flag."""
    try:
        return load(name, **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        what = f" ({options['subfolder']})" if "subfolder" in options else ""
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--{flag}={name}: cannot be loaded{what}: {reason}. Give a folder in diffusers' layout or a Hub id; "
            "a private one needs --hub_token or `hf auth login`"
        ) from error


def enable_memory_savers(components: Components, *, gradient_checkpointing: bool, xformers: bool) -> None:
    """Gradient checkpointing and xformers attention, in the ControlNet and the UNet it is trained through.

    Raises:
        UserError: if xformers cannot run here.
    """
    for module in (components.unet, components.controlnet):
        if gradient_checkpointing:
            module.enable_gradient_checkpointing()
        if xformers:
            try:
                module.enable_xformers_memory_efficient_attention()
            except (ImportError, ModuleNotFoundError, ValueError, NotImplementedError) as error:
                raise UserError(
                    f"--enable_xformers_memory_efficient_attention: {' '.join(str(error).split())[:200]}; "
                    "needs a CUDA GPU and pip install 'raycontrolnet[xformers]'"
                ) from error


@contextmanager
def vae_on(components: Components, device: torch.device) -> Iterator[None]:
    """The VAE on `device` for as long as it is needed, then where it was."""
    before = components.vae.device
    components.vae.to(device)
    try:
        yield
    finally:
        components.vae.to(before)


def with_controlnet(components: Components, controlnet: ControlNetModel) -> Components:
    """The same frozen models with another ControlNet."""
    return replace(components, controlnet=controlnet)
