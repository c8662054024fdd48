"""Reference for tests: rectified flow's loss for a base of `flow_family`, written out with diffusers' own modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from flow_family import T5_TOKENS
from reference import normalize, to_tensor
from torch import Tensor

from raycontrolnet.data.records import PreparedRow
from raycontrolnet.model.batch import Draws


def write_trained_controlnet(base: Path, folder: Path) -> Path:
    """Make a ControlNet as training leaves it: its zero layers are no longer zero, and it has an effect."""
    from diffusers import SD3ControlNetModel, SD3Transformer2DModel

    transformer = SD3Transformer2DModel.from_pretrained(base, subfolder="transformer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        controlnet = SD3ControlNetModel.from_transformer(transformer, num_layers=2, num_extra_conditioning_channels=0)
        for module in (*controlnet.controlnet_blocks, controlnet.pos_embed_input):
            for parameter in module.parameters():
                assert not parameter.any()
                torch.nn.init.normal_(parameter, std=0.2)
    controlnet.save_pretrained(folder)
    return folder


def reference_loss(base: Path, controlnet_folder: Path, prepared: list[PreparedRow], draws: Draws) -> Tensor:
    """Return the loss of a batch: rectified flow's, by diffusers' modules.

    Esser et al. 2024 (arXiv:2403.03206): eq. 13 with a_t = 1 - t and b_t = t, and the velocity noise - x as target.
    """
    from diffusers import AutoencoderKL, SD3ControlNetModel, SD3Transformer2DModel

    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    transformer = SD3Transformer2DModel.from_pretrained(base, subfolder="transformer")
    controlnet = SD3ControlNetModel.from_pretrained(controlnet_folder)
    captions, pooled = encode_prompt(base, [row.prompt for row in prepared])

    pixels = normalize(to_tensor(np.stack([row.image for row in prepared if row.image is not None])))
    posterior = vae.encode(pixels).latent_dist
    sampled = posterior.mean + posterior.std * draws.posterior_noise
    latents = (sampled - vae.config.shift_factor) * vae.config.scaling_factor
    control_pixels = normalize(to_tensor(np.stack([row.conditioning_image for row in prepared])))
    control = vae.encode(control_pixels).latent_dist.mode() * vae.config.scaling_factor

    sigma = draws.timesteps[:, None, None, None] / 1000
    noise = draws.noise if draws.input_noise is None else draws.input_noise
    noisy_latents = (1 - sigma) * latents + sigma * noise
    (residuals,) = controlnet(
        noisy_latents,
        control,
        encoder_hidden_states=captions,
        pooled_projections=torch.zeros_like(pooled),
        timestep=draws.timesteps,
        return_dict=False,
    )
    prediction = transformer(
        noisy_latents,
        encoder_hidden_states=captions,
        pooled_projections=pooled,
        timestep=draws.timesteps,
        block_controlnet_hidden_states=residuals,
    ).sample
    return torch.nn.functional.mse_loss(prediction, draws.noise - latents)


def encode_prompt(base: Path, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the captions' hidden states as diffusers' pipeline for Stable Diffusion 3 makes them, and the pooled."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    hidden_states, pooled = [], []
    for number in ("", "_2"):
        tokenizer = CLIPTokenizer.from_pretrained(base, subfolder=f"tokenizer{number}")
        text_encoder = CLIPTextModelWithProjection.from_pretrained(base, subfolder=f"text_encoder{number}")
        tokens = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        output = text_encoder(tokens.input_ids, output_hidden_states=True)
        hidden_states.append(output.hidden_states[-2])
        pooled.append(output.text_embeds)
    clip = torch.cat(hidden_states, dim=-1)
    padded = torch.nn.functional.pad(clip, (0, 8))  # to the width of the text encoder that is left out
    return torch.cat([padded, torch.zeros(len(prompts), T5_TOKENS, padded.shape[-1])], dim=1), torch.cat(pooled, -1)
