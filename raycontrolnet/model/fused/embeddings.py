"""The ControlNet's embedding of conditioning images, of full size, with each bias in the pass of the SiLU behind it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from raycontrolnet.model.fused import biased_silu
from raycontrolnet.model.fused.norms import is_channels_last
from raycontrolnet.model.fused.resnets import is_plain_convolution, without_bias


class FusedConditioningEmbedding(ControlNetConditioningEmbedding):
    """diffusers' `ControlNetConditioningEmbedding` whose biases and SiLUs are one pass."""

    def forward(self, conditioning: Tensor) -> Tensor:
        embedding = conditioning.contiguous(memory_format=torch.channels_last)
        for convolution in (self.conv_in, *self.blocks):
            embedding = _biased_silu(without_bias(convolution, embedding), convolution.bias)
        output: Tensor = self.conv_out(embedding)
        return output


def is_plain_embedding(embedding: ControlNetConditioningEmbedding) -> bool:
    """Check for convolutions of PyTorch's own, with biases."""
    convolutions = (embedding.conv_in, *embedding.blocks)
    return all(is_plain_convolution(each) and each.bias is not None for each in convolutions)


def _biased_silu(images: Tensor, bias: Tensor) -> Tensor:
    if not is_channels_last(images):
        return silu(images + bias.to(images.dtype)[:, None, None])
    found: Tensor = _BiasedSiLU.apply(images, bias)
    return found


class _BiasedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(images, bias)
        return biased_silu.forward(images, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        images, bias = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_images, of_bias = biased_silu.backward(images, gradient, bias, of_bias=ctx.needs_input_grad[1])
        return of_images, None if of_bias is None else of_bias.to(bias.dtype)
