"""Updates whose figures are not finite: left out, or the run's end, with the samples and the module to blame.

The samples of such an update are done again, one by one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raycontrolnet.data.stream import BatchLoader
from raycontrolnet.errors import RunError, UserError
from raycontrolnet.model.batch import draw, latent_shape, make_batch
from raycontrolnet.model.components import Components
from raycontrolnet.model.loading import VAE
from raycontrolnet.model.step import TrainState, controlnet_loss, with_posterior
from raycontrolnet.storage.files import check_open
from raycontrolnet.text import first_of
from raycontrolnet.training.metrics import LEFT_OUT_FILE, UpdateMetrics

logger = logging.getLogger(__name__)

MOST_SAMPLES = 64
"""Samples that are done again: an update may have thousands."""


class NotFiniteUpdates:
    """The updates that were not taken since the workers started, because a figure was not finite.

    Args:
        most: number that may be left out; 0 for none.
        folder: gets the file that names them; None on other workers than that of rank 0.
    """

    def __init__(self, state: TrainState, most: int, folder: Path | None):
        self.state, self.most = state, most
        self.log = folder / LEFT_OUT_FILE if folder else None
        self.count = 0

    def add(self, update: UpdateMetrics, problem: str, loader: BatchLoader) -> None:
        """Log an update that was not taken.

        Raises:
            RunError: if there are more than may be left out; names the samples that are to blame.
        """
        self.count += 1
        samples = range(update.samples - self.state.samples_per_update, update.samples)
        with self.state.paused():
            said = f"{problem}. {diagnosis(self.state, loader, samples)}"
        if self.count > self.most:
            more = f". More than --max_nan={self.most} such updates since the start" if self.most else ""
            raise RunError(said + more)
        left_out = f"left out, {self.count} of at most {self.most}"
        logger.warning("%s; %s", said, left_out)
        if self.log:
            check_open(self.log)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": update.step, "problem": f"{problem}; {left_out}"}) + "\n")


def diagnosis(state: TrainState, loader: BatchLoader, samples: Sequence[int]) -> str:
    """Return which samples are to blame, by their places, and what to do, in a sentence or two.

    Args:
        samples: k of the samples of an update that was not taken, so that the weights are those before it.
    """
    components, device = state.components, state.accelerator.device
    unencoded, not_finite, done, modules = [], [], 0, list[str]()
    models = {"controlnet": components.controlnet, components.family.denoiser: components.denoiser}
    for index in samples[:MOST_SAMPLES]:
        place = loader.place(index)
        try:
            row = loader.sample(index)
        except UserError:  # which the run will say itself
            continue
        done += 1
        batch = with_posterior(components, make_batch([row], components, device))
        assert batch.posterior is not None
        shape = latent_shape(components, row.size)
        draws = draw(loader.order.seed, [index], shape, components.draw_timestep, device, objective=state.objective)
        if not batch.posterior.isfinite().all():
            unencoded.append(place)
            continue
        again = partial(controlnet_loss, components, components.controlnet, batch, draws, state.objective)
        before = len(modules)
        with torch.no_grad(), _first_not_finite(models, modules):
            if not again().isfinite().all():
                not_finite.append(place)
        if len(modules) > before:
            modules[:] = [_layer_in(modules[0], models, again)]
    if unencoded:
        kind = str(components.vae.dtype).removeprefix("torch.")
        advice = _advice_on_vae(components)
        return f"The VAE gives latents that are not finite in {kind} for {first_of(unencoded)}: {advice}"
    lower = "lower --learning_rate"
    if state.accelerator.mixed_precision == "fp16":
        lower += ", or use --mixed_precision bf16"
    if not_finite and len(not_finite) < done:
        where = f", from {modules[0]} on" if modules else ""
        found = f"The loss is not finite for {first_of(not_finite)}{where}, and is for the others"
        return f"{found}: look at these, or {lower}"
    places = [loader.place(index) for index in samples]
    where = f". The first module whose output is not finite: {modules[0]}" if modules else ""
    return f"Training has diverged: {lower}. The update's samples: {first_of(places)}{where}"


def _layer_in(module: str, models: Mapping[str, torch.nn.Module], again: Callable[[], Any]) -> str:
    """Return the first layer in `module` whose output is not finite: a fused block calls none of its own."""
    from raycontrolnet.model.fused.layers import plain_layers  # imports diffusers

    found: list[str] = []
    with torch.no_grad(), plain_layers(*models.values()), _first_not_finite(models, found):
        again()
    return found[0] if found and found[0].startswith(f"{module}.") else module


def _advice_on_vae(components: Components) -> str:
    dtype = components.vae.dtype
    if dtype == torch.float32:
        return f"the VAE or these images are damaged; name another VAE with --{VAE}, or leave out these rows"
    encodes = "add --cache_latents on, which encodes in fp32"
    if components.family.vae_dtype(dtype, named=False) != dtype:
        return f"leave out --{VAE}: the base model's own runs in fp32; or {encodes}"
    return f"{encodes}, or use --mixed_precision bf16"


@contextmanager
def _first_not_finite(models: Mapping[str, torch.nn.Module], found: list[str]) -> Iterator[None]:
    """Add to `found` the name of the first module that gives an output which is not finite, unless it has one."""

    def look(name: str, _: torch.nn.Module, __: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = (value for value in outputs if isinstance(value, torch.Tensor))
        if not found and not all(tensor.isfinite().all() for tensor in tensors):
            found.append(name)

    named = ((f"{part}.{name}", module) for part, model in models.items() for name, module in model.named_modules())
    hooks = [module.register_forward_hook(partial(look, name.rstrip("."))) for name, module in named]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
