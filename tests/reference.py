"""Reference for tests: the arithmetic of the diffusers example, written out with diffusers' own models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.records import PreparedRow
from raycontrolnet.model.batch import Draws, draw, make_batch
from raycontrolnet.model.step import TrainState, train_step
from raycontrolnet.training.schedule import Schedule
from raycontrolnet.training.state import accelerator_for, build_state, state_parts, write_parts

CPU = torch.device("cpu")
LATENT_SHAPE = (4, 4, 4)
"""The tiny base's, at 32 pixels."""


def draw_timestep(rng: np.random.Generator, _: object = None) -> int:
    """Draw one of DDPM's 1,000 timesteps, as the script does."""
    return int(rng.integers(1000))


def write_trained_controlnet(base: Path, folder: Path, seed: int = 0) -> Path:
    """Make a ControlNet as training leaves it: its zero convolutions are no longer zero, and it has an effect."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        controlnet = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(base, subfolder="unet"))
        zero_convolutions = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
        for module in [*zero_convolutions, controlnet.controlnet_cond_embedding.conv_out]:
            for parameter in module.parameters():
                assert not parameter.any()
                torch.nn.init.normal_(parameter, std=0.2)
    controlnet.save_pretrained(folder)
    return folder


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Do torchvision's ToTensor: uint8 [..., H, W, 3] -> float32 [..., 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.moveaxis(images, -1, -3).astype(np.float32)) / 255


def normalize(pixels: Tensor) -> Tensor:
    """Do torchvision's Normalize([0.5], [0.5])."""
    return (pixels - 0.5) / 0.5


def reference_loss(base: Path, controlnet_folder: Path, rows: list[PreparedRow], draws: Draws) -> Tensor:
    """Return the loss of a batch in fp32, with everything that carries gradients to the ControlNet left attached."""
    model_pred, target = reference_prediction(base, controlnet_folder, rows, draws)
    return torch.nn.functional.mse_loss(model_pred.float(), target.float(), reduction="mean")


def reference_prediction(
    base: Path, controlnet_folder: Path, rows: list[PreparedRow], draws: Draws, **scheduler: Any
) -> tuple[Tensor, Tensor]:
    """Return the UNet's prediction and its target, both [B, C, h, w].

    Args:
        base: folder of the base model.
        controlnet_folder: folder of the ControlNet.
        rows: the batch.
        draws: of the batch.
        scheduler: changes of its configuration.
    """
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    noise_scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler", **scheduler)
    tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(base, subfolder="text_encoder")
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    controlnet = ControlNetModel.from_pretrained(controlnet_folder)

    pixel_values = normalize(to_tensor(np.stack([row.image for row in rows if row.image is not None])))
    conditioning_pixel_values = to_tensor(np.stack([row.conditioning_image for row in rows]))
    prompts = [row.prompt for row in rows]
    input_ids = tokenizer(
        prompts, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids

    posterior = vae.encode(pixel_values).latent_dist
    latents = (posterior.mean + posterior.std * draws.posterior_noise) * vae.config.scaling_factor
    new_noise = draws.noise if draws.input_noise is None else draws.input_noise
    noisy_latents = noise_scheduler.add_noise(latents, new_noise, draws.timesteps)
    encoder_hidden_states = text_encoder(input_ids, return_dict=False)[0]
    down_block_res_samples, mid_block_res_sample = controlnet(
        noisy_latents,
        draws.timesteps,
        encoder_hidden_states=encoder_hidden_states,
        controlnet_cond=conditioning_pixel_values,
        return_dict=False,
    )
    model_pred = unet(
        noisy_latents,
        draws.timesteps,
        encoder_hidden_states=encoder_hidden_states,
        down_block_additional_residuals=down_block_res_samples,
        mid_block_additional_residual=mid_block_res_sample,
        return_dict=False,
    )[0]
    if noise_scheduler.config.prediction_type == "epsilon":
        target = draws.noise
    else:
        assert noise_scheduler.config.prediction_type == "v_prediction"
        target = noise_scheduler.get_velocity(latents, draws.noise, draws.timesteps)
    return model_pred, target


@contextmanager
def training(settings: dict[str, Any], num_samples: int = 13) -> Iterator[TrainState]:
    """Build the state at the start of a run in this process."""
    config = TrainConfig(**settings)
    with accelerator_for(config, use_gpu=False) as accelerator:
        yield build_state(config, Schedule.of(config, num_samples, 1), accelerator, None, None)


def fake_row(sample_index: int, resolution: int) -> PreparedRow:
    """Return a valid sample with made-up content."""
    rng = np.random.default_rng(sample_index)
    image, conditioning_image = rng.integers(0, 256, (2, resolution, resolution, 3), dtype=np.uint8)
    sizes = (*rng.integers(resolution, 9 * resolution, 2).tolist(), *rng.integers(0, 99, 2).tolist())
    return PreparedRow(
        sample_index,
        image,
        conditioning_image,
        f"prompt {sample_index}",
        size_conditions=(*sizes, resolution, resolution),
    )


def fake_rows(*sample_indices: int) -> list[PreparedRow]:
    return [fake_row(index, 32) for index in sample_indices]


def save_state(state: TrainState, folder: Path) -> None:
    """Write a state into a checkpoint's folder at once."""
    write_parts(state.components.controlnet, state_parts(state), folder)


def steps(state: TrainState, *batches: list[PreparedRow], seed: int = 0, weight: float = 1.0) -> list[Any]:
    """Do a `train_step` for each of `batches`; returns what they return."""
    return [
        train_step(
            state,
            make_batch(rows, state.components, CPU),
            draw(seed, [row.sample_index for row in rows], LATENT_SHAPE, draw_timestep, CPU),
            weight,
        )
        for rows in batches
    ]
