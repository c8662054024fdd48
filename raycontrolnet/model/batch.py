"""A batch on the device, and the random draws of its samples: the inputs of the training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raycontrolnet.config.objective_settings import PLAIN, ObjectiveConfig
from raycontrolnet.data.order import Purpose, keyed_rng
from raycontrolnet.data.records import PreparedRow
from raycontrolnet.model.components import Components


class Batch(NamedTuple):
    """B samples on the device."""

    images: Tensor | None
    """uint8 [B, H, W, 3] RGB; None if `posterior` is there."""
    conditioning_images: Tensor
    """uint8 [B, H, W, 3] RGB."""
    tokens: tuple[Tensor, ...]
    """int64 [B, T] of each tokenizer: the prompts, padded and truncated to its maximum length T."""
    size_conditions: Tensor | None = None
    """fp32 [B, 6]: as in `PreparedRow`, for families that have them."""
    posterior: Tensor | None = None
    """fp16 or fp32 [B, 2, C, h, w]: mean and log-variance from the latent cache; None to encode `images`."""


class Draws(NamedTuple):
    """The random draws of B samples, on the device."""

    posterior_noise: Tensor
    """fp32 [B, C, h, w], standard normal: picks the latents from the VAE's posterior."""
    noise: Tensor
    """fp32 [B, C, h, w], standard normal but for --noise_offset: the noise added to the latents."""
    timesteps: Tensor
    """int64 or fp32 [B], as the family draws them."""
    input_noise: Tensor | None = None
    """fp32 [B, C, h, w]: noise of the model's input if it is another than that of the target; None if it is `noise`."""


def make_batch(rows: Sequence[PreparedRow], components: Components, device: torch.device) -> Batch:
    """Stack prepared rows on the device, still uint8: a quarter of the bytes to copy.

    Args:
        rows: with images of one size.
        components: of which the tokenizers are used.
    """
    tokens = components.family.tokenize(components.tokenizers, [row.prompt for row in rows])
    return Batch(
        images=_stacked([row.image for row in rows], device),
        conditioning_images=to_device(torch.from_numpy(np.stack([row.conditioning_image for row in rows])), device),
        tokens=tuple(to_device(ids, device) for ids in tokens),
        size_conditions=_size_conditions(rows, device) if components.family.has_size_conditions else None,
        posterior=_stacked([row.posterior for row in rows], device),
    )


def _stacked(arrays: Sequence[NDArray[Any] | None], device: torch.device) -> Tensor | None:
    """Stack the arrays on the device; None if the rows have none."""
    there = [array for array in arrays if array is not None]
    return to_device(torch.from_numpy(np.stack(there)), device) if there else None


def _size_conditions(rows: Sequence[PreparedRow], device: torch.device) -> Tensor:
    return to_device(torch.tensor([row.size_conditions for row in rows], dtype=torch.float32), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device, without waiting if it is a GPU, which pinned memory allows."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def draw(
    seed: int,
    sample_indices: Sequence[int],
    latent_shape: tuple[int, ...],
    draw_timestep: Callable[[np.random.Generator, ObjectiveConfig], float],
    device: torch.device,
    purpose: Purpose = Purpose.DIFFUSION,
    objective: ObjectiveConfig = PLAIN,
) -> Draws:
    """Return the draws of samples k, from (seed, purpose, k) alone.

    They are made on the CPU, so that they are the same on every kind of device.

    Args:
        latent_shape: (C, h, w) of one sample's latents.
        draw_timestep: of a sample, from its generator: `Components.draw_timestep`.
        purpose: of the draws.
        objective: decides the timesteps, and what is added to the noise; the rest of a sample's draws stays the same.
    """
    noises, timesteps = [], []
    for index in sample_indices:
        # Not a torch.Generator: on a CPU it uses 32 bits of its seed, and among 100,000 samples two would be alike.
        rng = keyed_rng(seed, purpose, index)
        normal = rng.standard_normal((2, *latent_shape), dtype=np.float32)
        timesteps.append(draw_timestep(rng, objective))
        noises.append(_with_added_noise(normal, rng, objective))
    posterior_noise, noise, *input_noise = to_device(torch.from_numpy(np.stack(noises, axis=1)), device)
    return Draws(posterior_noise, noise, to_device(torch.tensor(timesteps), device), *input_noise)


def _with_added_noise(
    noise: NDArray[np.float32], rng: np.random.Generator, objective: ObjectiveConfig
) -> NDArray[np.float32]:
    """Return a sample's noises [2, C, h, w] with the objective's offset, and if it has one, with that of the input.

    Offset noise is Guttenberg's (2023, crosslabs.org/blog/diffusion-with-offset-noise), input perturbation that of Ning
    et al. (2023, arXiv:2301.11706); both as in diffusers' scripts.
    """
    if not objective.noise_offset and not objective.input_perturbation:
        return noise
    # Streams of their own: neither depends on the other, or on how timesteps are drawn.
    of_offset, of_input = rng.spawn(2)
    channels, *size = noise.shape[1:]
    if objective.noise_offset:
        offset = of_offset.standard_normal((channels, *[1] * len(size)), dtype=np.float32)
        noise[1] += np.float32(objective.noise_offset) * offset
    if not objective.input_perturbation:
        return noise
    more = of_input.standard_normal(noise.shape[1:], dtype=np.float32)
    return np.concatenate([noise, (noise[1] + np.float32(objective.input_perturbation) * more)[None]])


def latent_shape(components: Components, size: tuple[int, ...] | int) -> tuple[int, int, int]:
    """Return (C, h, w) of one image's latents.

    Args:
        size: height and width of the image, and perhaps more; one number is both.
    """
    factor = 2 ** (len(components.vae.config["block_out_channels"]) - 1)
    height, width = (size, size) if isinstance(size, int) else size[:2]
    return components.vae.config["latent_channels"], height // factor, width // factor
