"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.model.families.clip import load_text_encoder, load_tokenizers
from raycontrolnet.model.families.family import Conditioning
from raycontrolnet.model.families.unet import UNET, VAE, UNetFamily
from raycontrolnet.model.kinds import kind_of_unet
from raycontrolnet.model.layout import Layout

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from raycontrolnet.model.batch import Batch
    from raycontrolnet.model.components import Components

EMBEDDING = "text_time"
"""`addition_embed_type`: pooled caption, sizes and crop are added to the timestep's embedding."""
REFINER_SIZES = 5
"""Numbers that the refiner is conditioned on: size, corner and aesthetic score; the base model has six."""


@dataclass(frozen=True, kw_only=True)
class StableDiffusionXL(UNetFamily):
    """Two CLIP text encoders, whose penultimate hidden states condition the UNet, with sizes and crop."""

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        return config.get("addition_embed_type") == EMBEDDING

    def kind_of_other(self, config: Mapping[str, Any]) -> str | None:
        width, sizes = config.get("cross_attention_dim"), config.get("addition_time_embed_dim")
        # The refiner has the second text encoder alone, so that the widths of caption and pooled caption agree.
        alone = isinstance(width, int) and isinstance(sizes, int) and width + REFINER_SIZES * sizes
        if alone and config.get("projection_class_embeddings_input_dim") == alone:
            return "an SDXL refiner, which only finishes images"
        kind = kind_of_unet(config, added=EMBEDDING)
        return f"{kind}, of SDXL" if kind else None

    def load_text(
        self, model: ModelConfig, token: str | None, dtype: torch.dtype
    ) -> tuple[tuple[CLIPTokenizer, ...], tuple[Any, ...]]:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        one = load_text_encoder(model, token, CLIPTextModel, dtype)
        two = load_text_encoder(model, token, CLIPTextModelWithProjection, dtype, "text_encoder_2")
        return load_tokenizers(model, token, (one, two), self.tokenizers), (one, two)

    def vae_dtype(self, dtype: torch.dtype, *, named: bool) -> torch.dtype:
        return dtype if named else torch.float32  # SDXL's own VAE overflows in half precision

    def encode_prompts(self, components: Components, batch: Batch) -> Conditioning:
        encoded = [
            text_encoder(input_ids, output_hidden_states=True)
            for text_encoder, input_ids in zip(components.text_encoders, batch.tokens, strict=True)
        ]
        return {
            "encoder_hidden_states": torch.cat([text.hidden_states[-2] for text in encoded], dim=-1),
            "added_cond_kwargs": {"text_embeds": encoded[-1].text_embeds, "time_ids": batch.size_conditions},
        }

    def modelspec_architecture(self, controlnet: Mapping[str, Any], prediction_type: str | None) -> str | None:
        return "stable-diffusion-xl-v1-base"

    def pipeline_parts(self, components: Components) -> dict[str, Any]:
        (text_encoder, text_encoder_2), (tokenizer, tokenizer_2) = components.text_encoders, components.tokenizers
        return {
            "text_encoder": text_encoder,
            "text_encoder_2": text_encoder_2,
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer_2,
            "add_watermarker": False,
        }


STABLE_DIFFUSION_XL = StableDiffusionXL(
    name="sdxl",
    title="Stable Diffusion XL",
    part_classes={
        "unet": UNET,
        "vae": VAE,
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
    },
    tokenizers=("tokenizer", "tokenizer_2"),
    pipeline="StableDiffusionXLControlNetPipeline",
    tags=("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    interpolation="lanczos",
    guidance_scale=5.0,
    has_size_conditions=True,
    layouts=(
        Layout(
            (
                "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
                "conditioner.embedders.1.model.positional_embedding",
            ),
            "stabilityai/stable-diffusion-xl-base-1.0",
        ),
    ),
)
