"""The training step: a function of (state, batch, draws). No I/O, no Ray, no globals, no randomness of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from raycontrolnet.config.objective_settings import PLAIN, ObjectiveConfig
from raycontrolnet.data.order import Purpose, keyed_rng
from raycontrolnet.data.records import PreparedRow
from raycontrolnet.model.averages import update_averages
from raycontrolnet.model.components import Components
from raycontrolnet.model.diffusion import per_sample_loss, sample_posterior
from raycontrolnet.model.vae import encode_images

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from diffusers.training_utils import EMAModel


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


@dataclass
class TrainState:
    """The state that training changes, and the accelerator that drives it."""

    components: Components
    controlnet: torch.nn.Module
    """`components.controlnet` as the accelerator prepared it (autocast, DDP)."""
    optimizer: AcceleratedOptimizer
    lr_scheduler: LRScheduler
    accelerator: Accelerator
    max_grad_norm: float
    set_grads_to_none: bool
    samples_per_update: int
    """Samples of all workers together."""
    objective: ObjectiveConfig = PLAIN
    averages: EMAModel | None = None
    """Averages of the ControlNet's trained weights over the updates."""
    compiled: bool = False
    """True if the denoiser and the ControlNet are compiled, for batches of the step's shape."""
    step: int = 0
    """Optimizer updates done."""
    samples: int = 0
    """k: samples of the updates done."""

    def begin_update(self, micro_steps: int) -> None:
        """Let the next update be of `micro_steps` of `train_step` on this worker."""
        self.accelerator.gradient_accumulation_steps = micro_steps
        self.accelerator.step = 0


class StepMetrics(NamedTuple):
    """Figures of one training step."""

    loss: Tensor
    """fp32 scalar on the device, detached: this worker's mean over the batch."""
    grad_norm: Tensor | None
    """fp32 scalar before clipping; None when the batch ended no update, 0 when fp16's loss scaler skipped it."""
    lr: float
    """Learning rate of the update."""


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


def controlnet_loss(
    components: Components,
    controlnet: torch.nn.Module,
    batch: Batch,
    draws: Draws,
    objective: ObjectiveConfig = PLAIN,
) -> Tensor:
    """Return the loss of every sample, fp32 [B]: of the base model's prediction, steered by the ControlNet.

    ControlNet (Zhang et al. 2023, arXiv:2302.05543), eq. 5.

    Args:
        objective: decides the kind of loss, and its weights.
    """
    family, noise_scheduler = components.family, components.noise_scheduler
    with torch.no_grad():
        mean, logvar = _posterior(components, batch)
        latents = family.scale_latents(components.vae, sample_posterior(mean, logvar, draws.posterior_noise))
        conditioning = family.encode_prompts(components, batch)
        control = family.control(components, batch.conditioning_images)

    noisy_latents, target = family.diffuse(noise_scheduler, latents, draws)
    if draws.input_noise is not None:
        noisy_latents, _ = family.diffuse(noise_scheduler, latents, draws._replace(noise=draws.input_noise))
    prediction = family.predict(components, controlnet, noisy_latents, draws.timesteps, control, conditioning)
    loss = per_sample_loss(prediction, target, objective.huber_delta if objective.loss == "huber" else None)
    if objective.snr_gamma is None:
        return loss
    return loss * family.min_snr_weights(noise_scheduler, draws.timesteps, objective.snr_gamma)


def with_posterior(components: Components, batch: Batch) -> Batch:
    """Return the batch with its images encoded, to be used more than once."""
    with torch.no_grad():
        mean, logvar = _posterior(components, batch)
    return batch._replace(images=None, posterior=torch.stack([mean, logvar], dim=1))


def _posterior(components: Components, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return mean and log-variance of the images' latents, [B, C, h, w]: from the cache, or encoded now."""
    if batch.posterior is not None:
        mean, logvar = batch.posterior.unbind(1)
        return mean, logvar
    assert batch.images is not None
    return encode_images(components.vae, batch.images)


def _skip_if_not_finite(optimizer: AcceleratedOptimizer, grad_norm: Tensor) -> None:
    """Let the next step of the optimizer change nothing if a gradient is not finite, as fp16's loss scaler does.

    With an optimizer that is not fused, as bitsandbytes', the host waits for the device.
    """
    not_finite = ~grad_norm.isfinite()
    if optimizer.defaults.get("fused"):
        # As torch's own loss scaler tells a fused optimizer: on the device, so that nobody waits for it.
        optimizer.optimizer.found_inf = not_finite.float()
    elif not_finite:
        optimizer.zero_grad(set_to_none=True)


def train_step(state: TrainState, batch: Batch, draws: Draws, weight: float = 1.0) -> StepMetrics:
    """Do a forward and a backward pass, and with the last of an accumulation an optimizer update.

    Args:
        weight: of this worker's gradients in the average over the workers; see `Share`.
    """
    accelerator = state.accelerator
    with accelerator.accumulate(state.controlnet):
        loss = controlnet_loss(state.components, state.controlnet, batch, draws, state.objective).mean()
        accelerator.backward(loss * weight)
        grad_norm = None
        lr = float(state.lr_scheduler.get_last_lr()[0])
        if accelerator.sync_gradients:
            grad_norm = accelerator.clip_grad_norm_(state.controlnet.parameters(), state.max_grad_norm)
            if accelerator.scaler is None:
                _skip_if_not_finite(state.optimizer, grad_norm)
        state.optimizer.step()
        if accelerator.sync_gradients:
            # fp16's loss scaler skips an update whose gradients overflowed; the schedule then waits.
            if accelerator.optimizer_step_was_skipped:
                grad_norm = torch.zeros_like(loss)
            else:
                state.lr_scheduler.step()
                if state.averages:
                    update_averages(state.averages, state.components.controlnet)
            state.step += 1
            state.samples += state.samples_per_update
        state.optimizer.zero_grad(set_to_none=state.set_grads_to_none)
    return StepMetrics(loss.detach(), grad_norm, lr)
