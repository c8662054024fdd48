"""Configurations of the published base models, as far as they differ from the classes' defaults, and of a small one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
}  # fmt: skip
CLIP_L: dict[str, Any] = {
    "model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768,
}  # fmt: skip
OPENCLIP_H: dict[str, Any] = {
    "model_type": "clip_text_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
    "num_attention_heads": 16, "projection_dim": 512, "hidden_act": "gelu",
}  # fmt: skip
OPENCLIP_BIG_G: dict[str, Any] = {
    "model_type": "clip_text_model", "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip

SD15: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    },
    "vae": VAE,
    "text_encoder": CLIP_L,
    "scheduler": SCHEDULER,
}  # fmt: skip
"""stable-diffusion-v1-5; its heads are 40, 80 and 160 wide."""
SD21: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
    },
    "vae": VAE,
    "text_encoder": OPENCLIP_H,
    "scheduler": SCHEDULER,
}  # fmt: skip
"""stable-diffusion-2-1-base; its heads are 64 wide."""
SDXL: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel", "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280], "layers_per_block": 2, "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": VAE | {"scaling_factor": 0.13025},
    "text_encoder": CLIP_L,
    "text_encoder_2": OPENCLIP_BIG_G,
    "scheduler": SCHEDULER,
}  # fmt: skip
"""stable-diffusion-xl-base-1.0."""

TINY: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel", "sample_size": 16, "block_out_channels": [80, 160],
        "layers_per_block": 1, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "cross_attention_dim": 64, "attention_head_dim": 2,
        "norm_num_groups": 16,
    },
    "vae": VAE | {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1},
    "text_encoder": {
        "model_type": "clip_text_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 1000, "projection_dim": 64, "eos_token_id": 999,
    },
    "scheduler": {"_class_name": "DDPMScheduler"},
}  # fmt: skip
"""A small base whose heads are 40 and 80 wide, as those of Stable Diffusion 1.5."""


def write_configurations(base: Mapping[str, Mapping[str, Any]], folder: Path) -> Path:
    """Write the configurations of a base as diffusers lays them out."""
    for part, config in base.items():
        (folder / part).mkdir(parents=True)
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / name).write_text(json.dumps(config))
    return folder
