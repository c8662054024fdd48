"""A search for the samples that made an update not finite: they are done again, one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raycontrolnet.data.stream import BatchLoader
from raycontrolnet.errors import UserError
from raycontrolnet.model.step import TrainState, controlnet_loss, draw, latent_shape, make_batch, with_posterior
from raycontrolnet.text import SHOWN_PROBLEMS

MOST_SAMPLES = 64
"""Samples that are done again: an update may have thousands."""
LOWER = "lower --learning_rate, or use --mixed_precision bf16 instead of fp16"


def diagnosis(state: TrainState, loader: BatchLoader, resolution: int, samples: Sequence[int]) -> str:
    """Return which samples are to blame, by their places, and what to do, in a sentence or two.

    Args:
        samples: k of the samples of an update that was not taken, so that the weights are those before it.
    """
    components, device = state.components, state.accelerator.device
    shape, num_timesteps = latent_shape(components, resolution), components.noise_scheduler.config
    unencoded, not_finite, done = [], [], 0
    for index in samples[:MOST_SAMPLES]:
        place = loader.place(index)
        try:
            row = loader.sample(index)
        except UserError:  # which the run will say itself
            continue
        done += 1
        batch = with_posterior(components, make_batch([row], components.tokenizer, device))
        assert batch.posterior is not None
        draws = draw(loader.order.seed, [index], shape, num_timesteps["num_train_timesteps"], device)
        if not batch.posterior.isfinite().all():
            unencoded.append(place)
            continue
        with torch.no_grad():
            if not controlnet_loss(components, components.controlnet, batch, draws).isfinite().all():
                not_finite.append(place)
    if unencoded:
        kind = str(components.vae.dtype).removeprefix("torch.")
        return (
            f"The VAE gives latents that are not finite in {kind} for {_listed(unencoded)}: add --cache_latents on, "
            "which encodes in fp32, or use --mixed_precision bf16"
        )
    if not_finite and len(not_finite) < done:
        return f"The loss is not finite for {_listed(not_finite)}, and is for the others: look at these, or {LOWER}"
    places = [loader.place(index) for index in samples]
    return f"Training has diverged: {LOWER}. The update's samples: {_listed(places)}"


def _listed(places: Sequence[str]) -> str:
    more = len(places) - SHOWN_PROBLEMS
    return ", ".join(places[:SHOWN_PROBLEMS]) + (f" and {more:,} more" if more > 0 else "")
