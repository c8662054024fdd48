"""A tiny base model of `flow_family` in diffusers' layout, with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from base_model import END, TINY, build_text_encoder, build_vae, write_parts, write_tokenizer
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextModelWithProjection

CHANNELS = 6
"""Channels of the latents; not the four of Stable Diffusion 1.x, 2.x and XL."""
LATENT_SHAPE = (CHANNELS, 4, 4)
"""At 32 pixels."""


def write_random_flow_base(folder: Path, *, seed: int = 0) -> Path:
    """Write the base model to `folder`, as `write_random_base`."""
    tokenizers = [write_tokenizer(folder / name, pad) for name, pad in (("tokenizer", END), ("tokenizer_2", "!"))]
    second = replace(TINY, text_width=24)
    text = {"layers": 2, "cls": CLIPTextModelWithProjection}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        vae = build_vae(TINY, CHANNELS)
        vae.register_to_config(shift_factor=0.5)
        parts = {
            "text_encoder": build_text_encoder(TINY, tokenizers[0], **text),
            "text_encoder_2": build_text_encoder(second, tokenizers[1], **text),
            "vae": vae,
            "transformer": SD3Transformer2DModel(
                sample_size=TINY.resolution // 8,
                patch_size=2,
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                num_layers=4,
                num_attention_heads=2,
                attention_head_dim=8,
                caption_projection_dim=16,
                joint_attention_dim=TINY.text_width + second.text_width + 8,
                pooled_projection_dim=TINY.text_width + second.text_width,
                pos_embed_max_size=8,
                qk_norm="rms_norm",
            ),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        }
    return write_parts(folder, parts, "StableDiffusion3Pipeline")
