"""The memory and the work of a run's step on one worker's device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.records import Size
from raycontrolnet.model.batch import latent_shape
from raycontrolnet.model.components import Components
from raycontrolnet.model.graphs import has_graphs
from raycontrolnet.model.optimizers import MOMENTS, copies_weights
from raycontrolnet.model.performance import enable_memory_savers
from raycontrolnet.model.size import FP32_BYTES
from raycontrolnet.predict.count import count_encoding, count_steps, input_bytes

GIB = 2**30
MIB = 2**20
LEAST_RESERVED, RESERVED = 1.0 * GIB, 3.0 * GIB
"""Bytes that CUDA's context and the kernels' workspaces need, at least and to be sure."""
GAPS = 0.03
"""Share of the device's memory that is lost between blocks."""


class Reserve(NamedTuple):
    """The bytes of a device that are not for the step."""

    at_least: float
    to_be_sure: float
    user: str


OF_CUDA = Reserve(LEAST_RESERVED, RESERVED, "CUDA")
OF_PYTHON = Reserve(0.5 * GIB, 2.0 * GIB, "Python")
"""On a CPU: of a worker's libraries, which take 0.5 GiB, and of the processes of Ray that load its data."""

ERROR = 0.1
"""Share by which a prediction may be too high."""


@dataclass(frozen=True)
class Prediction:
    """One worker's memory and work, exact but for CUDA's own needs and the kernels' workspaces."""

    weights: dict[str, int]
    """Part -> number of its weights."""
    trained: int
    """Number of the ControlNet's weights that have gradients."""
    frozen_bytes: dict[str, int]
    """Frozen part on the device -> bytes of its weights."""
    moment_bytes: float
    """Bytes of the optimizer for each weight of the ControlNet."""
    activations_base: float
    activations_per_sample: float
    """Bytes of activations: base + samples x per sample; exact for the batch of the settings."""
    flop_per_sample: int
    """Floating-point operations of a forward and a backward pass."""
    dispatches: int
    """Calls of operators in a step."""
    latents: int
    """Numbers in the latents of a sample."""
    encoding_flop: int = 0
    """Floating-point operations by which the VAE encodes an image for the latent cache."""
    has_averages: bool = False
    """True for a run that averages its weights (--use_ema)."""
    optimizer_copies: bool = False
    """True for an optimizer whose update makes a copy of all weights."""
    has_graphs: bool = False
    """True for CUDA graphs, which keep the memory of a step's activations."""
    graph_inputs_per_sample: int = 0
    """Bytes of a sample in the inputs that CUDA graphs keep, of a batch of each size; 0 without graphs."""

    @property
    def trained_bytes(self) -> dict[str, int]:
        """Bytes that the ControlNet's weights, gradients and moments take, and the averages if there are any."""
        return {
            "ControlNet": FP32_BYTES * self.weights["ControlNet"],
            "gradients": FP32_BYTES * self.trained,
            "optimizer": round(self.moment_bytes * self.trained),
            **({"averages": FP32_BYTES * self.trained} if self.has_averages else {}),
        }

    @property
    def _fixed(self) -> int:
        """Bytes that do not depend on the batch."""
        return sum(self.frozen_bytes.values()) + sum(self.trained_bytes.values())

    def activations(self, batch_size: int) -> float:
        return self.activations_base + self.activations_per_sample * batch_size

    def graph_inputs(self, batch_size: int) -> int:
        return self.graph_inputs_per_sample * batch_size

    @property
    def _copied(self) -> int:
        """Bytes of a copy of the weights, which some optimizers make, and every update of the averages."""
        return FP32_BYTES * self.trained if self.has_averages or self.optimizer_copies else 0

    def updating(self, batch_size: int) -> float:
        """Return the bytes that an update takes beyond the activations, of which none are left but those in graphs."""
        return self._copied if self.has_graphs else max(0.0, self._copied - self.activations(batch_size))

    def total(self, batch_size: int) -> float:
        """Return the most bytes at a time, beside CUDA's context and the kernels' workspaces."""
        of_batch = self.activations(batch_size) + self.graph_inputs(batch_size)
        return self._fixed + of_batch + self.updating(batch_size)

    def fits(self, batch_size: int, device_bytes: float, reserved: float = LEAST_RESERVED) -> bool:
        """Check whether a batch fits a device, of which CUDA or Python take `reserved` bytes."""
        return self.total(batch_size) + margin(device_bytes, reserved) <= device_bytes

    def cannot_fit(self, batch_size: int, device_bytes: float) -> bool:
        """Check whether a batch does not fit a device even if the prediction is too high, and CUDA needs nothing."""
        return self.total(batch_size) * (1 - ERROR) > device_bytes

    def largest_batch(self, device_bytes: float, reserved: float = RESERVED) -> int:
        """Return the largest batch that fits a device to be sure; 0 if none does."""
        left = device_bytes - margin(device_bytes, reserved) - self._fixed
        if left < self._copied:
            return 0
        if self.has_graphs:
            left -= self._copied
        per_sample = self.activations_per_sample + self.graph_inputs_per_sample
        return max(0, int((left - self.activations(0)) // per_sample))

    def with_8bit_adam(self) -> Prediction:
        return replace(self, moment_bytes=MOMENTS[True], optimizer_copies=False)

    def without_graphs(self) -> Prediction:
        return replace(self, has_graphs=False, graph_inputs_per_sample=0)


def margin(device_bytes: float, reserved: float = RESERVED) -> float:
    """Return the bytes of a device that a step cannot have: `reserved` ones, and gaps between blocks."""
    return reserved + GAPS * device_bytes


def predict(
    components: Components,
    config: TrainConfig,
    *,
    cached: bool,
    sizes: Sequence[Size] = (),
    on_gpu: bool = False,
) -> Prediction:
    """Predict the step of `config`, by counts of its batch and of twice that, on models that have shapes alone.

    Args:
        components: of `shaped`, which must be active.
        config: the run's settings.
        cached: the run trains from cached latents.
        sizes: of the buckets; empty for the resolution squared.
        on_gpu: count the layers of a GPU, which `components` have from then on.
    """
    if on_gpu and not config.compile:
        _use_layers_of_gpus(components)
    _set_checkpointing(components, on=config.gradient_checkpointing)
    size = config.train_batch_size
    sizes = sizes or ((config.resolution, config.resolution),)
    largest = max(sizes, key=math.prod)
    one, two = count_steps(components, (size, 2 * size), largest, cached=cached, objective=config)
    parts = {"text encoder": components.text_encoders, "VAE": (components.vae,), "denoiser": (components.denoiser,)}
    vae_waits = cached and not components.family.encodes_control
    frozen = {name: modules for name, modules in parts.items() if name != "VAE" or not vae_waits}
    per_sample = (two.activations - one.activations) / size
    graphs = has_graphs(config, on_gpu=on_gpu, num_workers=config.most_workers)
    how: dict[str, Any] = {"cached": cached, "latents_dtype": getattr(torch, config.latents_dtype), "objective": config}
    return Prediction(
        weights={
            **{name: sum(map(_numel, modules)) for name, modules in parts.items()},
            "ControlNet": _numel(components.controlnet),
        },
        trained=sum(weight.numel() for weight in components.controlnet.parameters() if weight.requires_grad),
        frozen_bytes={name: sum(map(_nbytes, modules)) for name, modules in frozen.items()},
        moment_bytes=MOMENTS[config.use_8bit_adam],
        activations_base=one.activations - size * per_sample,
        activations_per_sample=per_sample,
        flop_per_sample=(two.flop - one.flop) // size,
        dispatches=one.dispatches,
        latents=math.prod(latent_shape(components, largest)),
        encoding_flop=count_encoding(components, largest),
        has_averages=config.use_ema,
        optimizer_copies=on_gpu and copies_weights(config),
        has_graphs=graphs,
        graph_inputs_per_sample=input_bytes(components, sizes, **how) if graphs else 0,
    )


def _set_checkpointing(components: Components, *, on: bool) -> None:
    for module in (components.denoiser, components.controlnet):
        module.disable_gradient_checkpointing()
    enable_memory_savers(components, gradient_checkpointing=on, xformers=False)


def _use_layers_of_gpus(components: Components) -> None:
    """Let the step run as on a GPU: on images that are channels-last, by fused layers."""
    from raycontrolnet.model.fused.layers import use_fused_layers  # imports diffusers

    for module in (*components.denoiser.modules(), *components.controlnet.modules()):
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim == 4:  # `Module.to` would swap tensors, which not all without data allow
                turned = weight.detach().contiguous(memory_format=torch.channels_last)
                setattr(module, name, torch.nn.Parameter(turned, requires_grad=weight.requires_grad))
    use_fused_layers(components)


def _numel(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _nbytes(module: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())
