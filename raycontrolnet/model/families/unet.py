"""The part that families with a UNet, CLIP text encoders and DDPM's noise have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.diffusion import add_noise, prediction_target
from raycontrolnet.model.families.family import Conditioning, Family
from raycontrolnet.model.kinds import kind_of_unet
from raycontrolnet.model.loading import BASE, part, weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTokenizer

    from raycontrolnet.model.components import Components
    from raycontrolnet.model.step import Draws

UNET, VAE = ("UNet2DConditionModel",), ("AutoencoderKL",)


@dataclass(frozen=True, kw_only=True)
class UNetFamily(Family):
    """A family whose UNet predicts DDPM's noise or velocity."""

    def kind_of_other(self, config: Mapping[str, Any]) -> str | None:
        return kind_of_unet(config)

    def load_denoiser(self, model: ModelConfig, token: str | None) -> tuple[UNet2DConditionModel, DDPMScheduler]:
        from diffusers import DDPMScheduler, UNet2DConditionModel

        noise_scheduler = part(model, token, DDPMScheduler.from_pretrained, subfolder="scheduler")
        unet = weights(model, token, UNet2DConditionModel, torch.float32, "unet", variant=model.variant)
        return unet, noise_scheduler

    def controlnet_class(self) -> type[ControlNetModel]:
        from diffusers import ControlNetModel

        return ControlNetModel

    def tokenize(self, tokenizers: Sequence[CLIPTokenizer], prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return tuple(
            tokenizer(
                list(prompts),
                max_length=tokenizer.model_max_length,
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in tokenizers
        )

    def scale_latents(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        return latents * vae.config["scaling_factor"]

    def diffuse(self, noise_scheduler: DDPMScheduler, latents: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        alphas_cumprod = noise_scheduler.alphas_cumprod.to(draws.timesteps.device)[draws.timesteps]
        prediction_type = noise_scheduler.config["prediction_type"]
        return (
            add_noise(latents, draws.noise, alphas_cumprod),
            prediction_target(prediction_type, latents, draws.noise, alphas_cumprod),
        )

    def predict(
        self,
        components: Components,
        controlnet: torch.nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        control: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        dtype = components.unet.dtype
        noisy_latents = noisy_latents.to(dtype)
        down_residuals, mid_residual = controlnet(
            noisy_latents, timesteps, controlnet_cond=control.to(dtype), return_dict=False, **conditioning
        )
        prediction: Tensor = components.unet(
            noisy_latents,
            timesteps,
            down_block_additional_residuals=[residual.to(dtype) for residual in down_residuals],
            mid_block_additional_residual=mid_residual.to(dtype),
            return_dict=False,
            **conditioning,
        )[0]
        return prediction

    def build_pipeline(self, components: Components) -> Any:
        import diffusers

        return getattr(diffusers, self.pipeline)(
            vae=components.vae,
            unet=components.unet,
            controlnet=components.controlnet,
            # the configuration says what the UNet predicts (epsilon or v), so both kinds of base work
            scheduler=diffusers.UniPCMultistepScheduler.from_config(components.noise_scheduler.config),
            **self.pipeline_parts(components),
        )

    @abstractmethod
    def pipeline_parts(self, components: Components) -> dict[str, Any]:
        """Return the arguments of the pipeline besides UNet, VAE, ControlNet and scheduler."""


def load_text_encoder(
    model: ModelConfig, token: str | None, cls: Any, dtype: torch.dtype, folder: str = "text_encoder"
) -> Any:
    """Load a text encoder of the base model on the CPU."""
    return weights(model, token, cls, dtype, folder, variant=model.variant)


def load_tokenizer(
    model: ModelConfig, token: str | None, text_encoder: Any, folder: str = "tokenizer", flag: str = BASE
) -> CLIPTokenizer:
    """Load a tokenizer from a folder of the base model, or from the model that the setting `flag` names.

    Raises:
        UserError: if it is missing, or of another text encoder.
    """
    from transformers import CLIPTokenizer

    place = {"subfolder": folder} if flag == BASE else {}
    tokenizer = part(model, token, CLIPTokenizer.from_pretrained, flag, **place)
    # Of a folder without a tokenizer, Transformers makes an empty one, of endless length.
    most = text_encoder.config.max_position_embeddings
    if tokenizer.model_max_length > most:
        raise UserError(
            f"--{flag}={getattr(model, flag)}: its {folder} is missing or of another model (model_max_length "
            f"{tokenizer.model_max_length:.4g}, the text encoder takes {most} tokens)"
        )
    return tokenizer
