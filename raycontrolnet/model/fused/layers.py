"""Layers of a base model and its ControlNet in the shape that a GPU runs fastest, with PyTorch's results.

On an H200 a step of Stable Diffusion 1.5 (batch 48, bf16) spent a quarter of its time on turning images from one memory
layout to the other, and on reading across them: PyTorch's group norm (before 2.14) and diffusers' transformers leave
images channels-first, convolutions want them channels-last. GEGLU took three passes over its input, and six for the
gradient. Names, weights and files stay as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor
from torch.autograd.function import once_differentiable

from raycontrolnet.model.components import Components
from raycontrolnet.text import error_message

logger = logging.getLogger(__name__)

TRIED = (2, 80, 12, 13)
"""Shape of the images on which the kernels are tried; no multiple of what a program holds."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference from PyTorch's results, by the norm; two roundings each."""


class ChannelsLastGroupNorm(torch.nn.GroupNorm):
    """`torch.nn.GroupNorm` whose output is channels-last if its input is, on a GPU."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (as torch names it)
        if not _is_channels_last(input):
            return super().forward(input)
        # CUDA's autocast computes norms in fp32, and leaves them so.
        dtype = torch.float32 if torch.is_autocast_enabled(input.device.type) else input.dtype
        normalized: Tensor = _GroupNorm.apply(input, self.weight, self.bias, self.num_groups, self.eps, dtype)
        return normalized


class FusedGEGLU(GEGLU):
    """diffusers' `GEGLU` whose activation and product are one pass."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        gated: Tensor = _Gated.apply(self.proj(hidden_states))
        return gated


class ChannelsLastTransformer2DModel(Transformer2DModel):
    """diffusers' `Transformer2DModel` whose output is channels-last, as its tokens are in memory."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        # Private in diffusers, which makes the images contiguous here, in the other layout.
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        images = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        if not self.use_linear_projection:
            images = self.proj_out(images)
        return images + residual


FUSED = {
    torch.nn.GroupNorm: ChannelsLastGroupNorm,
    GEGLU: FusedGEGLU,
    Transformer2DModel: ChannelsLastTransformer2DModel,
}


def fuse_layers(components: Components) -> None:
    """Let the denoiser and the ControlNet on a GPU run fused layers, if these work there; else leave them, and log why.

    Triton compiles its kernels at their first call, for which it needs a C compiler.
    """
    weight = next(components.denoiser.parameters())
    if problem := problem_of_kernels(weight.device, weight.dtype):
        logger.warning("training goes on with PyTorch's layers, more slowly: fused ones cannot run here: %s", problem)
        return
    for model in (components.denoiser, components.controlnet):
        for module in model.modules():
            if fused := FUSED.get(type(module)):
                module.__class__ = fused


def problem_of_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Try the kernels beside PyTorch's layers on a few numbers, and return what is wrong with them, if anything is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.randn(TRIED).to(device, dtype, memory_format=torch.channels_last)
        norm, gate = torch.nn.GroupNorm(16, TRIED[1]), GEGLU(TRIED[1], 48)
        for weight in norm.parameters():
            torch.nn.init.normal_(weight)
    tokens = images.permute(0, 2, 3, 1).flatten(1, 2)
    for module, inputs in ((norm.to(device, dtype), images), (gate.to(device, dtype), tokens)):
        expected = with_gradients(module, inputs)
        module.__class__ = FUSED[type(module)]
        try:
            found = with_gradients(module, inputs)
        except Exception as error:  # noqa: BLE001 (of Triton, of its compiler, of the driver)
            return f"{type(error).__name__}: {error_message(error, 200)}"
        for one, other in zip(expected, found, strict=True):
            off = float((one.float() - other.float()).norm() / one.float().norm())
            if not off <= TOLERANCE[dtype]:
                return f"{type(module).__name__} differs from PyTorch's by a share of {off:.2g}"
    return None


def with_gradients(module: torch.nn.Module, inputs: Tensor) -> list[Tensor]:
    """Return a module's output, and where its gradient is its tanh, those of its inputs and weights."""
    inputs = inputs.detach().requires_grad_()
    output = module(inputs)
    return [output.detach(), *torch.autograd.grad(output, [inputs, *module.parameters()], output.detach().tanh())]


def _is_channels_last(images: Tensor) -> bool:
    """Check for images with the channels as the last dimension in memory, whose other layout would be another."""
    return images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, dtype: torch.dtype
    ) -> Tensor:
        from raycontrolnet.model.fused import group_norm

        normalized, means, rstds = group_norm.forward(images, weight, bias, groups, eps, dtype)
        ctx.save_for_backward(images, weight, means, rstds)
        return normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from raycontrolnet.model.fused import group_norm

        images, weight, means, rstds = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_images, of_channels = group_norm.backward(images, gradient, means, rstds, weight)
        of_bias, of_weight = of_channels.sum(1).to(weight.dtype) if any(ctx.needs_input_grad[1:3]) else (None, None)
        return of_images, of_weight, of_bias, None, None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        from raycontrolnet.model.fused import geglu

        projected = projected.contiguous()
        ctx.save_for_backward(projected)
        return geglu.forward(projected)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        from raycontrolnet.model.fused import geglu

        (projected,) = ctx.saved_tensors
        return geglu.backward(projected, gradient.contiguous())
