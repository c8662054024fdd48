"""A family with a flow-matching transformer: Stable Diffusion 3 (Esser et al. 2024, arXiv:2403.03206) without its T5.

The file that a new family needs, as it would lie beside those in `raycontrolnet/model/families/`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.model.families.clip import load_text_encoder, load_tokenizers, tokenize
from raycontrolnet.model.families.family import Conditioning, Family
from raycontrolnet.model.loading import part, weights
from raycontrolnet.model.vae import encode_images

if TYPE_CHECKING:
    import numpy as np
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3ControlNetModel, SD3Transformer2DModel
    from transformers import CLIPTokenizer

    from raycontrolnet.model.batch import Batch, Draws
    from raycontrolnet.model.components import Components

T5_TOKENS = 256
"""Tokens of the text encoder that is left out, whose places are zeros, as in diffusers' pipeline."""


@dataclass(frozen=True, kw_only=True)
class FlowFamily(Family):
    """A transformer that predicts rectified flow's velocity, with two CLIP text encoders."""

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        return config.get("_class_name") in (self.controlnet, *self.part_classes[self.denoiser])

    def kind_of_other(self, config: Mapping[str, Any]) -> str | None:
        return None

    def scheduler_problem(self, config: Mapping[str, Any]) -> str | None:
        name = str(config.get("_class_name", self.sampler))
        return None if name == self.sampler else f"its scheduler is {name}; only rectified flow can be trained"

    def load_denoiser(
        self, model: ModelConfig, token: str | None
    ) -> tuple[SD3Transformer2DModel, FlowMatchEulerDiscreteScheduler]:
        from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

        noise_scheduler = part(model, token, FlowMatchEulerDiscreteScheduler.from_pretrained, subfolder="scheduler")
        folder = self.denoiser
        return weights(
            model, token, SD3Transformer2DModel, torch.float32, folder, variant=model.variant
        ), noise_scheduler

    def load_text(
        self, model: ModelConfig, token: str | None, dtype: torch.dtype
    ) -> tuple[tuple[CLIPTokenizer, ...], tuple[Any, ...]]:
        from transformers import CLIPTextModelWithProjection

        folders = ("text_encoder", "text_encoder_2")
        encoders = tuple(load_text_encoder(model, token, CLIPTextModelWithProjection, dtype, name) for name in folders)
        return load_tokenizers(model, token, encoders, self.tokenizers), encoders

    def make_controlnet(self, denoiser: SD3Transformer2DModel) -> SD3ControlNetModel:
        from diffusers import SD3ControlNetModel

        layers = denoiser.config["num_layers"] // 2
        return SD3ControlNetModel.from_transformer(denoiser, num_layers=layers, num_extra_conditioning_channels=0)

    def without_effect(self, controlnet: SD3ControlNetModel) -> Sequence[torch.nn.Module]:
        last = controlnet.transformer_blocks[-1]  # of which the caption's half goes nowhere
        return last.attn.to_add_out, last.ff_context

    def vae_dtype(self, dtype: torch.dtype, *, named: bool) -> torch.dtype:
        return torch.float32

    def tokenize(self, tokenizers: Sequence[CLIPTokenizer], prompts: Sequence[str]) -> tuple[Tensor, ...]:
        return tokenize(tokenizers, prompts)

    def encode_prompts(self, components: Components, batch: Batch) -> Conditioning:
        encoded = [
            text_encoder(input_ids, output_hidden_states=True)
            for text_encoder, input_ids in zip(components.text_encoders, batch.tokens, strict=True)
        ]
        captions = torch.cat([text.hidden_states[-2] for text in encoded], dim=-1)
        width = components.denoiser.config["joint_attention_dim"]
        captions = torch.nn.functional.pad(captions, (0, width - captions.shape[-1], 0, T5_TOKENS))
        return {
            "encoder_hidden_states": captions,
            "pooled_projections": torch.cat([text.text_embeds for text in encoded], dim=-1),
        }

    def scale_latents(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        return (latents - vae.config["shift_factor"]) * vae.config["scaling_factor"]

    def unscale_latents(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        return latents / vae.config["scaling_factor"] + vae.config["shift_factor"]

    def draw_timestep(self, rng: np.random.Generator, noise_scheduler: FlowMatchEulerDiscreteScheduler) -> float:
        return self.spread_timestep(1 / (1 + math.exp(-rng.standard_normal())), noise_scheduler)

    def spread_timestep(self, fraction: float, noise_scheduler: FlowMatchEulerDiscreteScheduler) -> float:
        shift = noise_scheduler.config["shift"]
        return noise_scheduler.config["num_train_timesteps"] * shift * fraction / (1 + (shift - 1) * fraction)

    def control(self, components: Components, conditioning_images: Tensor) -> Tensor:
        mean, _ = encode_images(components.vae, conditioning_images)
        return mean.float() * components.vae.config["scaling_factor"]  # without the shift, as diffusers' pipeline

    def diffuse(
        self, noise_scheduler: FlowMatchEulerDiscreteScheduler, latents: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        sigma = (draws.timesteps / noise_scheduler.config["num_train_timesteps"]).view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * draws.noise, draws.noise - latents

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
        pooled = conditioning["pooled_projections"]
        if components.controlnet.config["force_zeros_for_pooled_projection"]:
            pooled = torch.zeros_like(pooled)
        residuals = controlnet(
            hidden_states=noisy_latents,
            timestep=timesteps,
            controlnet_cond=control.to(dtype),
            return_dict=False,
            **conditioning | {"pooled_projections": pooled},
        )[0]
        prediction: Tensor = components.denoiser(
            hidden_states=noisy_latents,
            timestep=timesteps,
            block_controlnet_hidden_states=[residual.to(dtype) for residual in residuals],
            return_dict=False,
            **conditioning,
        )[0]
        return prediction

    def build_pipeline(self, components: Components) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3ControlNetPipeline

        (text_encoder, text_encoder_2), (tokenizer, tokenizer_2) = components.text_encoders, components.tokenizers
        return StableDiffusion3ControlNetPipeline(
            vae=_MeanEncoder(components.vae),
            transformer=components.denoiser,
            controlnet=components.controlnet,
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(components.noise_scheduler.config),
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            text_encoder_3=None,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            tokenizer_3=None,
        )


class _MeanEncoder:
    """The VAE with the mean of its posterior alone: diffusers' pipeline samples it by torch's random state."""

    def __init__(self, vae: AutoencoderKL):
        self._vae = vae

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def encode(self, images: Tensor) -> Any:
        posterior = self._vae.encode(images).latent_dist
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=posterior.mode))


FLOW = FlowFamily(
    name="flow",
    title="Tiny Flow",
    part_classes={
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
    },
    tokenizers=("tokenizer", "tokenizer_2"),
    denoiser_title="transformer",
    controlnet="SD3ControlNetModel",
    noise_scheduler="FlowMatchEulerDiscreteScheduler",
    shared_config=("joint_attention_dim", "pooled_projection_dim", "num_attention_heads", "attention_head_dim"),
    copied=("pos_embed.", "time_text_embed.", "context_embedder."),
    pipeline="StableDiffusion3ControlNetPipeline",
    control_argument="control_image",
    sampler="FlowMatchEulerDiscreteScheduler",
    tags=("stable-diffusion-3",),
    guidance_scale=7.0,
    resolution_multiple=16,  # two latents to a patch
    encodes_control=True,
)
