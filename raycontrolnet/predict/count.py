"""Work and memory of a training step, counted on tensors that have shapes and types alone: nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from raycontrolnet.model.components import Components
from raycontrolnet.model.step import Batch, Draws, controlnet_loss, latent_shape, with_posterior

SIZES = 6
"""Numbers of a row's size conditions."""
HALF = (torch.float16, torch.bfloat16)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # Fused attention on CPUs, which torch counts on GPUs alone.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operator -> floating-point operations of a call, by its arguments and its result."""


@dataclass(frozen=True)
class Counted:
    """One step, forward and backward, of a batch."""

    flop: int
    """Floating-point operations; a multiplication and an addition are two."""
    activations: int
    """Most bytes that are alive at a time, besides weights, gradients and the optimizer's moments."""
    dispatches: int
    """Calls of operators."""


class StepCounter(TorchDispatchMode):
    """Counts calls, floating-point operations, and the bytes of tensors made in it as long as something holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatches = self.flop = self.peak = self._alive = 0
        self._seen = weakref.WeakSet[Any]()

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave out tensors that were there before."""
        for tensor in tensors:
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.dispatches += 1
        if formula := FORMULAS.get(func.overloadpacket):
            self.flop += formula(*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                size = storage.nbytes()
                self._alive += size
                self.peak = max(self.peak, self._alive)
                weakref.finalize(storage, self._freed, size)
        return result

    def _freed(self, size: int) -> None:
        self._alive -= size


def count_step(components: Components, batch_size: int, resolution: int, *, cached: bool) -> Counted:
    """Count a step of `batch_size` samples at `resolution`, from the latent cache or from pixels.

    Args:
        components: on tensors without data, as of `shapes`; the ControlNet runs under autocast if the frozen models
            are in half precision.
    """
    batch, draws = _inputs(components, batch_size, resolution)
    if cached:
        batch = with_posterior(components, batch)
    parameters = list(components.controlnet.parameters())
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # as left by the update before
    counter = StepCounter()
    for module in (*components.frozen(), components.controlnet):
        counter.ignore((*module.parameters(), *module.buffers()))
    counter.ignore(parameter.grad for parameter in parameters if parameter.grad is not None)
    with as_autocast_on_gpus(components) as controlnet, counter:
        controlnet_loss(components, controlnet, batch, draws).mean().backward()
    return Counted(counter.flop, counter.peak, counter.dispatches)


def _inputs(components: Components, batch_size: int, resolution: int) -> tuple[Batch, Draws]:
    """Return a batch from pixels, with its draws."""
    images = torch.zeros(batch_size, resolution, resolution, 3, dtype=torch.uint8)
    tokens = tuple(
        torch.zeros(batch_size, encoder.config.max_position_embeddings, dtype=torch.int64)
        for encoder in components.text_encoders
    )
    sizes = torch.zeros(batch_size, SIZES) if components.family.has_size_conditions else None
    noise = torch.zeros(batch_size, *latent_shape(components, resolution))
    timestep = components.family.spread_timestep(0.5, components.noise_scheduler)
    timesteps = torch.full((batch_size,), timestep)
    return Batch(images, images.clone(), tokens, sizes), Draws(noise, noise.clone(), timesteps)


@contextmanager
def as_autocast_on_gpus(components: Components) -> Iterator[Any]:
    """Give the ControlNet as accelerate runs it on a GPU: in half precision, with normalizations in fp32.

    A CPU's autocast leaves normalizations in half precision. If the frozen models are in fp32, so is the ControlNet.
    """
    controlnet, dtype = components.controlnet, next(components.frozen()[-1].parameters()).dtype
    if dtype not in HALF:
        yield controlnet
        return
    norms = [each for each in controlnet.modules() if isinstance(each, (torch.nn.GroupNorm, torch.nn.LayerNorm))]
    for module in norms:
        module.forward = _in_fp32(module.forward)  # type: ignore[method-assign]

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
