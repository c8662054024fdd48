"""The part that families with a UNet, CLIP text encoders and DDPM's noise have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raycontrolnet.config.objective_settings import ObjectiveConfig
from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.model.diffusion import PREDICTION_TYPES, add_noise, min_snr_weights, prediction_target
from raycontrolnet.model.families.clip import tokenize
from raycontrolnet.model.families.family import Conditioning, Family
from raycontrolnet.model.kinds import kind_of_unet, scheduler_problem
from raycontrolnet.model.loading import part, weights
from raycontrolnet.model.single_file import UNET as UNET_OF_FILES
from raycontrolnet.model.single_file import kind_of_file, unet_problem

if TYPE_CHECKING:
    import numpy as np
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTokenizer

    from raycontrolnet.model.batch import Draws
    from raycontrolnet.model.components import Components

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""Settings of diffusers' schedulers for noise whose last timestep has no signal, and for images that begin at it.

Lin et al. 2023, arXiv:2305.08891."""
UNET, VAE = ("UNet2DConditionModel",), ("AutoencoderKL",)


class Unscaled:
    """A scale of 1 for a ControlNet's residuals, which leaves them as they are: a float 1 would copy each of them."""

    def __rmul__(self, residual: Tensor) -> Tensor:
        return residual


@dataclass(frozen=True, kw_only=True)
class UNetFamily(Family):
    """A family whose UNet predicts DDPM's noise or velocity."""

    denoiser_title: str = "UNet"
    controlnet: str = "ControlNetModel"
    noise_scheduler: str = "DDPMScheduler"
    shared_config: tuple[str, ...] = ("cross_attention_dim", "block_out_channels", "layers_per_block")
    copied: tuple[str, ...] = ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")
    copied_of_files: tuple[str, ...] = tuple(
        f"{UNET_OF_FILES}{name}" for name in ("input_blocks.", "middle_block.", "time_embed.", "label_emb.")
    )

    def kind_of_other(self, config: Mapping[str, Any]) -> str | None:
        return kind_of_unet(config)

    def scheduler_problem(self, config: Mapping[str, Any]) -> str | None:
        return scheduler_problem(config)

    def objective_problems(self, objective: ObjectiveConfig, scheduler: Mapping[str, Any]) -> Iterator[str]:
        predicted = scheduler.get("prediction_type", PREDICTION_TYPES[0])
        if objective.rescale_betas_zero_snr and predicted == "epsilon":
            reason = "the base model predicts the noise (epsilon), which says nothing of the image where all is noise"
            yield f"--rescale_betas_zero_snr: {reason}; leave it out, or name a base that has v_prediction"

    def kind_of_file(self, header: Mapping[str, Mapping[str, Any]]) -> str | None:
        return kind_of_file(header)

    def file_problem(self, config: Mapping[str, Any], header: Mapping[str, Mapping[str, Any]]) -> str | None:
        return unet_problem(config, header)

    def load_denoiser(self, model: ModelConfig, token: str | None) -> tuple[UNet2DConditionModel, DDPMScheduler]:
        import diffusers
        from diffusers import UNet2DConditionModel

        scheduler = getattr(diffusers, self.noise_scheduler)
        noise_scheduler = part(model, token, scheduler.from_pretrained, subfolder="scheduler")
        unet = weights(model, token, UNet2DConditionModel, torch.float32, "unet", variant=model.variant)
        return unet, noise_scheduler

    def with_zero_snr(self, noise_scheduler: DDPMScheduler) -> DDPMScheduler:
        return type(noise_scheduler).from_config(noise_scheduler.config, **ZERO_SNR)

    def move_tables(self, noise_scheduler: DDPMScheduler, device: torch.device) -> None:
        noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod.to(device)

    def make_controlnet(self, denoiser: UNet2DConditionModel) -> ControlNetModel:
        from diffusers import ControlNetModel

        return ControlNetModel.from_unet(denoiser)

    def tokenize(self, tokenizers: Sequence[CLIPTokenizer], prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return tokenize(tokenizers, prompts)

    def scale_latents(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        return latents * vae.config["scaling_factor"]

    def unscale_latents(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        return latents / vae.config["scaling_factor"]

    def draw_timestep(self, rng: np.random.Generator, noise_scheduler: DDPMScheduler) -> int:
        return self.uniform_timestep(rng, noise_scheduler)

    def uniform_timestep(self, rng: np.random.Generator, noise_scheduler: DDPMScheduler) -> int:
        return int(rng.integers(noise_scheduler.config["num_train_timesteps"]))

    def spread_timestep(self, fraction: float, noise_scheduler: DDPMScheduler) -> int:
        return int(fraction * noise_scheduler.config["num_train_timesteps"])

    def diffuse(self, noise_scheduler: DDPMScheduler, latents: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        alphas_cumprod = noise_scheduler.alphas_cumprod[draws.timesteps]
        prediction_type = noise_scheduler.config["prediction_type"]
        return (
            add_noise(latents, draws.noise, alphas_cumprod),
            prediction_target(prediction_type, latents, draws.noise, alphas_cumprod),
        )

    def min_snr_weights(self, noise_scheduler: DDPMScheduler, timesteps: Tensor, gamma: float) -> Tensor:
        alphas_cumprod = noise_scheduler.alphas_cumprod[timesteps]
        return min_snr_weights(noise_scheduler.config["prediction_type"], alphas_cumprod, gamma)

    def predict(
        self,
        components: Components,
        controlnet: torch.nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        control: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        dtype = components.denoiser.dtype
        noisy_latents = noisy_latents.to(dtype)
        scale = 1.0 if components.compiled else Unscaled()  # of which a compiler would have to know
        down_residuals, mid_residual = controlnet(
            noisy_latents, timesteps, controlnet_cond=control.to(dtype), conditioning_scale=scale,
            return_dict=False, **conditioning,
        )  # fmt: skip
        prediction: Tensor = components.denoiser(
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
            unet=components.denoiser,
            controlnet=components.controlnet,
            # the configuration says what the UNet predicts (epsilon or v), so both kinds of base work
            scheduler=getattr(diffusers, self.sampler).from_config(components.noise_scheduler.config),
            **self.pipeline_parts(components),
        )

    @abstractmethod
    def pipeline_parts(self, components: Components) -> dict[str, Any]:
        """Return the arguments of the pipeline besides UNet, VAE, ControlNet and scheduler."""
