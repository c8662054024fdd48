"""The training step: a function of (state, batch, draws). No I/O, no Ray, no globals, no randomness of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from raycontrolnet.config.objective_settings import PLAIN, ObjectiveConfig
from raycontrolnet.model.averages import update_averages
from raycontrolnet.model.batch import Batch, Draws
from raycontrolnet.model.components import Components
from raycontrolnet.model.diffusion import per_sample_loss, sample_posterior
from raycontrolnet.model.gradients import GradientAverage
from raycontrolnet.model.graphs import GradientGraphs
from raycontrolnet.model.performance import uncompiled
from raycontrolnet.model.vae import encode_images

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from diffusers.training_utils import EMAModel


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
    graphs: GradientGraphs | None = None
    """The graphs of the forward and backward pass; None to run these without."""
    gradient_average: GradientAverage | None = None
    """The average over several workers; None for one, or where DDP does it."""
    step: int = 0
    """Optimizer updates done."""
    samples: int = 0
    """k: samples of the updates done."""

    def begin_update(self, micro_steps: int) -> None:
        """Let the next update be of `micro_steps` of `train_step` on this worker."""
        self.accelerator.gradient_accumulation_steps = micro_steps
        self.accelerator.step = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the models and the GPU's memory serve something else for a while: images, or measurements."""
        if self.graphs:
            self.graphs.release()
        with uncompiled(compiled=self.components.compiled):
            yield


class StepMetrics(NamedTuple):
    """Figures of one training step."""

    loss: Tensor
    """fp32 scalar on the device, detached: this worker's mean over the batch."""
    grad_norm: Tensor | None
    """fp32 scalar before clipping; None when the batch ended no update, 0 when fp16's loss scaler skipped it."""
    lr: float
    """Learning rate of the update."""


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
    return _loss(components, controlnet, (batch, draws, _conditioning(components, batch)), objective)


def _conditioning(components: Components, batch: Batch) -> dict[str, Any]:
    with torch.no_grad():
        return components.family.encode_prompts(components, batch)


def _loss(
    components: Components,
    controlnet: torch.nn.Module,
    inputs: tuple[Batch, Draws, dict[str, Any]],
    objective: ObjectiveConfig,
) -> Tensor:
    """Return the loss of every sample, fp32 [B], of a batch, its draws and what `Family.encode_prompts` made of it."""
    family, noise_scheduler = components.family, components.noise_scheduler
    batch, draws, conditioning = inputs
    with torch.no_grad():
        mean, logvar = _posterior(components, batch)
        latents = family.scale_latents(components.vae, sample_posterior(mean, logvar, draws.posterior_noise))
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

    With an optimizer that cannot skip on the device, as bitsandbytes', the host waits for the device.
    """
    not_finite = ~grad_norm.isfinite()
    if _skips_on_device(optimizer.optimizer):
        optimizer.optimizer.found_inf = not_finite.float()
    elif not_finite:
        optimizer.zero_grad(set_to_none=True)


def _skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Check that an optimizer reads `found_inf` on the device, as torch's own loss scaler asks it: the fused ones do.

    Not SGD's first step: if it is skipped, the momentum stays memory that nobody wrote (PyTorch 2.13).
    """
    begins_momentum = optimizer.defaults.get("momentum") and not optimizer.state
    return getattr(optimizer, "_step_supports_amp_scaling", False) and not begins_momentum


def train_step(state: TrainState, batch: Batch, draws: Draws, weight: float = 1.0) -> StepMetrics:
    """Do a forward and a backward pass, and with the last of an accumulation an optimizer update.

    Args:
        weight: of this worker's gradients in the average over the workers; see `Share`.
    """
    accelerator = state.accelerator
    with accelerator.accumulate(state.controlnet):
        loss = _add_gradients(state, batch, draws, weight)
        grad_norm = None
        lr = float(state.lr_scheduler.get_last_lr()[0])
        if accelerator.sync_gradients:
            if state.gradient_average:
                state.gradient_average.average()
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
    return StepMetrics(loss, grad_norm, lr)


def _add_gradients(state: TrainState, batch: Batch, draws: Draws, weight: float) -> Tensor:
    """Add to the gradients those of the mean loss times `weight`; return the mean loss, detached."""

    def add(inputs: tuple[Batch, Draws, dict[str, Any]]) -> Tensor:
        loss = _loss(state.components, state.controlnet, inputs, state.objective).mean()
        with state.gradient_average.watching() if state.gradient_average else nullcontext():
            state.accelerator.backward(loss * weight)
        return loss.detach()

    # Not in the graphs: Transformers 5.17 takes another attention, which rounds otherwise, while a stream is captured.
    inputs = batch, draws, _conditioning(state.components, batch)
    if state.graphs is None:
        return add(inputs)
    return state.graphs.add_gradients(add, inputs, weight, state.accelerator.gradient_accumulation_steps)
