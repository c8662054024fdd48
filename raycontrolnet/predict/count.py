"""Work and memory of a training step, counted on tensors that have shapes and types alone: nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from raycontrolnet.config.objective_settings import PLAIN, ObjectiveConfig
from raycontrolnet.data.records import Size
from raycontrolnet.model.batch import Batch, Draws, latent_shape
from raycontrolnet.model.components import Components
from raycontrolnet.model.step import controlnet_loss, with_posterior
from raycontrolnet.model.vae import encode_images
from raycontrolnet.predict.shape_tensors import memory_of

SIZES = 6
"""Numbers of a row's size conditions."""
MARK = 2**30 + 3
"""A batch by which everything that depends on the batch can be told: a prime, above the bytes of any tensor that does
not depend on it, and small enough for the sizes of those that do to have 63 bits."""
HALF = (torch.float16, torch.bfloat16)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    # Fused attention on CPUs, which torch counts on GPUs alone.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operator -> floating-point operations of a call, by its arguments and its result."""


@dataclass(frozen=True)
class StepCost:
    """One step, forward and backward, of a batch."""

    flop: int
    """Floating-point operations; a multiplication and an addition are two."""
    activations: int
    """Most bytes that are alive at a time, besides weights, gradients and the optimizer's moments."""
    dispatches: int
    """Calls of operators."""


class Amount(NamedTuple):
    """A number of a step, as it depends on the batch."""

    base: int
    per_sample: int

    def of(self, batch_size: int) -> int:
        return self.base + self.per_sample * batch_size


class StepCounter(TorchDispatchMode):
    """Counts calls, floating-point operations, and the bytes of tensors made in it as long as something holds them.

    Every number is split into a multiple of the batch and the rest. If the batch is `MARK`, the rest is the part that
    does not depend on the batch, and the counts of all batches are known.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self._batch_size, self._dispatches = batch_size, 0
        self._flop: list[Amount] = []
        self._memory: list[tuple[int, Amount]] = []
        """(1, bytes) for memory that is taken, and (-1, bytes) where it is given back."""
        self._seen = weakref.WeakSet[Any]()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Tell torch that nothing is compiled in this mode."""
        return True

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave out tensors that were there before."""
        for tensor in tensors:
            self._seen.add(memory_of(tensor)[0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._dispatches += 1
        if formula := FORMULAS.get(func.overloadpacket):
            self._flop.append(self._amount(formula(*args, **(kwargs or {}), out_val=result)))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                memory, num_bytes = memory_of(tensor)
                if memory not in self._seen:
                    self._seen.add(memory)
                    amount = self._amount(num_bytes)
                    self._memory.append((1, amount))
                    weakref.finalize(memory, self._memory.append, (-1, amount))
        return result

    def _amount(self, number: int) -> Amount:
        per_sample, base = divmod(number, self._batch_size)
        return Amount(base, per_sample)

    def of(self, batch_size: int) -> StepCost:
        """Return the counts of a batch: of any if the step's was `MARK`, else of that."""
        alive = accumulate(sign * amount.of(batch_size) for sign, amount in self._memory)
        flop = sum(amount.of(batch_size) for amount in self._flop)
        return StepCost(flop, max(alive, default=0), self._dispatches)


def count_steps(
    components: Components,
    batch_sizes: Iterable[int],
    resolution: Size | int,
    *,
    cached: bool,
    objective: ObjectiveConfig = PLAIN,
) -> tuple[StepCost, ...]:
    """Count steps of several batches at `resolution`, squared or (height, width), from the cache or from pixels.

    It is done once, for all of them.

    Args:
        components: of `shapes`; the ControlNet runs under autocast if the frozen models are in half precision.
    """
    counter = _counter(components, MARK, resolution, objective, cached=cached)
    return tuple(counter.of(batch_size) for batch_size in batch_sizes)


def _counter(
    components: Components, batch_size: int, resolution: Size | int, objective: ObjectiveConfig, *, cached: bool
) -> StepCounter:
    """Return the counter of a step that has been done."""
    batch, draws = _inputs(components, batch_size, resolution)
    if objective.input_perturbation:
        draws = draws._replace(input_noise=draws.noise.clone())
    if cached:
        batch = with_posterior(components, batch)
    parameters = list(components.controlnet.parameters())
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # as left by the update before
    counter = StepCounter(batch_size)
    for module in (*components.frozen(), components.controlnet):
        counter.ignore((*module.parameters(), *module.buffers()))
    counter.ignore(parameter.grad for parameter in parameters if parameter.grad is not None)
    with as_autocast_on_gpus(components) as controlnet, counter:
        controlnet_loss(components, controlnet, batch, draws, objective).mean().backward()
    return counter


def count_encoding(components: Components, resolution: Size) -> int:
    """Count the floating-point operations by which the VAE encodes one image, for the latent cache.

    Args:
        components: of `shapes`.
    """
    images = torch.zeros(1, *resolution, 3, dtype=torch.uint8)
    with torch.no_grad(), StepCounter(1) as counter:
        encode_images(components.vae, images)
    return counter.of(1).flop


def _inputs(components: Components, batch_size: int, resolution: Size | int) -> tuple[Batch, Draws]:
    """Return a batch from pixels, with its draws."""
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    images = torch.zeros(batch_size, height, width, 3, dtype=torch.uint8)
    tokens = tuple(
        torch.zeros(batch_size, encoder.config.max_position_embeddings, dtype=torch.int64)
        for encoder in components.text_encoders
    )
    sizes = torch.zeros(batch_size, SIZES) if components.family.has_size_conditions else None
    noise = torch.zeros(batch_size, *latent_shape(components, resolution))
    timestep = components.family.spread_timestep(0.5, components.noise_scheduler)
    timesteps = torch.full((batch_size,), timestep)
    return Batch(images, images.clone(), tokens, sizes), Draws(noise, noise.clone(), timesteps)


def input_bytes(
    components: Components,
    sizes: Iterable[Size],
    *,
    cached: bool,
    latents_dtype: torch.dtype,
    objective: ObjectiveConfig = PLAIN,
) -> int:
    """Return the bytes of a sample's inputs of a step, as CUDA graphs keep them, summed over image `sizes`.

    Args:
        components: of `shapes`.
        latents_dtype: of the cached latents.
    """
    total = 0
    for size in sizes:
        batch, draws = _inputs(components, 1, size)
        if objective.input_perturbation:
            draws = draws._replace(input_noise=draws.noise)
        if cached:
            posterior = torch.zeros(1, 2, *latent_shape(components, size), dtype=latents_dtype)
            batch = batch._replace(images=None, posterior=posterior)
        with torch.no_grad():
            conditioning = components.family.encode_prompts(components, batch)
        leaves = tree_leaves((batch, draws, conditioning))
        total += sum(each.nbytes for each in leaves if isinstance(each, torch.Tensor))
    return total


@contextmanager
def as_autocast_on_gpus(components: Components) -> Iterator[Any]:
    """Give the ControlNet as accelerate runs it on a GPU: in half precision, with normalizations in fp32.

    A CPU's autocast leaves normalizations in half precision. If the frozen models are in fp32, so is the ControlNet.
    """
    controlnet, dtype = components.controlnet, next(components.frozen()[-1].parameters()).dtype
    if dtype not in HALF:
        yield controlnet
        return
    # Fused ones are those of a GPU anyway.
    norms = [each for each in controlnet.modules() if type(each) in (torch.nn.GroupNorm, torch.nn.LayerNorm)]
    for module in norms:
        module.forward = _in_fp32(module.forward)

    def forward(*args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return controlnet(*args, **options)

    try:
        yield forward
    finally:
        for module in norms:
            del module.forward


def _in_fp32(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(values: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(values.float())

    return run
