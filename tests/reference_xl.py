"""Reference for tests: the arithmetic of diffusers' script for SDXL, written out with diffusers' own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import CPU, normalize, to_tensor, write_trained_controlnet
from torch import Tensor

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.data.records import PreparedRow
from raycontrolnet.model.batch import Draws
from raycontrolnet.model.components import Components, load_components


@pytest.fixture(scope="module")
def controlnet_folder(tiny_xl_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_controlnet(tiny_xl_base, tmp_path_factory.mktemp("controlnet"))


def load(base: Path, controlnet: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Components:
    names = {"pretrained_model_name_or_path": str(base), "controlnet_model_name_or_path": str(controlnet)}
    return load_components(ModelConfig(**names | settings), device=CPU, dtype=dtype, seed=0)


def encode_prompt(base: Path, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the caption's hidden states of both text encoders, side by side, and its pooled embedding."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    hidden_states = []
    for number, cls in (("", CLIPTextModel), ("_2", CLIPTextModelWithProjection)):
        tokenizer = CLIPTokenizer.from_pretrained(base, subfolder=f"tokenizer{number}")
        text_encoder = cls.from_pretrained(base, subfolder=f"text_encoder{number}")
        input_ids = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        output = text_encoder(input_ids, output_hidden_states=True)
        pooled = output[0]  # of the second one in the end
        hidden_states.append(output.hidden_states[-2])
    return torch.concat(hidden_states, dim=-1), pooled.view(len(prompts), -1)


def reference_loss(
    base: Path,
    controlnet_folder: Path,
    rows: list[PreparedRow],
    draws: Draws,
    time_ids: Tensor,
    vae_folder: Path | None = None,
) -> Tensor:
    """Return the loss of a batch in fp32; `time_ids` [B, 6] are original size, corner of the crop, and target size."""
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel

    noise_scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    vae = AutoencoderKL.from_pretrained(vae_folder or base / "vae")
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    controlnet = ControlNetModel.from_pretrained(controlnet_folder)

    pixel_values = normalize(to_tensor(np.stack([row.image for row in rows if row.image is not None])))
    conditioning_pixel_values = to_tensor(np.stack([row.conditioning_image for row in rows]))
    prompt_embeds, pooled_prompt_embeds = encode_prompt(base, [row.prompt for row in rows])
    added = {"text_embeds": pooled_prompt_embeds, "time_ids": time_ids.to(prompt_embeds.dtype)}

    posterior = vae.encode(pixel_values).latent_dist
    latents = (posterior.mean + posterior.std * draws.posterior_noise) * vae.config.scaling_factor
    noisy_latents = noise_scheduler.add_noise(latents, draws.noise, draws.timesteps)
    down_block_res_samples, mid_block_res_sample = controlnet(
        noisy_latents,
        draws.timesteps,
        encoder_hidden_states=prompt_embeds,
        added_cond_kwargs=added,
        controlnet_cond=conditioning_pixel_values,
        return_dict=False,
    )
    model_pred = unet(
        noisy_latents,
        draws.timesteps,
        encoder_hidden_states=prompt_embeds,
        added_cond_kwargs=added,
        down_block_additional_residuals=down_block_res_samples,
        mid_block_additional_residual=mid_block_res_sample,
    ).sample
    if noise_scheduler.config.prediction_type == "epsilon":
        target = draws.noise
    else:
        assert noise_scheduler.config.prediction_type == "v_prediction"
        target = noise_scheduler.get_velocity(latents, draws.noise, draws.timesteps)
    return torch.nn.functional.mse_loss(model_pred.float(), target.float(), reduction="mean")
