"""Layers of each kind that has kernels, with inputs, on which these are tried and compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

GROUPS = 16
"""Groups of each group norm."""

MOST_CHANNELS = 80
"""Channels of a residual block's output, at most: its convolutions would take long in fp64 on a CPU."""
MOST_TOKENS = 1000
"""Tokens of a transformer's images, at most: attention's time grows by their square."""


class Trial(NamedTuple):
    """A layer of PyTorch or diffusers, and inputs of it."""

    layer: torch.nn.Module
    inputs: tuple[Tensor, ...]

    def to(self, device: torch.device, weights: torch.dtype, values: torch.dtype) -> Trial:
        """Return the trial on a device, images channels-last, with weights and inputs in some dtypes."""
        inputs = tuple(
            each.to(device, values, memory_format=torch.channels_last if each.ndim == 4 else torch.preserve_format)
            for each in self.inputs
        )
        return Trial(self.layer.to(device, weights), inputs)


def trials(shape: Sequence[int]) -> tuple[Trial, ...]:
    """Return a trial of each kind, random but always the same, fp32 on the CPU; nothing is drawn from the process.

    Args:
        shape: of the images, [B, C, H, W]; C is a multiple of `GROUPS`.
    """
    channels, embedded = shape[1], 24
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images, embedding = torch.randn(*shape), torch.randn(shape[0], embedded)
        tokens = images.permute(0, 2, 3, 1).flatten(1, 2)
        norm = torch.nn.GroupNorm(GROUPS, channels)
        block = ResnetBlock2D(
            in_channels=channels, out_channels=min(channels, MOST_CHANNELS), temb_channels=embedded, groups=GROUPS,
            use_in_shortcut=True,
        )  # fmt: skip
        gate = GEGLU(channels, 48)
        transformer = BasicTransformerBlock(channels, 2, 40, cross_attention_dim=channels)
        of_tokens = transformer.norm1, transformer.norm2, transformer.norm3
        embedder = ControlNetConditioningEmbedding(32, block_out_channels=(16, 96))
        for module in (norm, block.norm1, block.norm2, *of_tokens, embedder.conv_out):
            for weight in module.parameters():
                torch.nn.init.normal_(weight)
    return (
        Trial(norm, (3 + images,)), Trial(block, (images, embedding)), Trial(gate, (tokens,)),
        Trial(transformer, (tokens[:, :MOST_TOKENS],)), Trial(embedder, (images[:, :3],)),
    )  # fmt: skip


def with_gradients(module: torch.nn.Module, *inputs: Tensor | None) -> list[Tensor]:
    """Return a module's output, and where its gradient is its tanh, those of its inputs and weights."""
    given = [each if each is None else each.detach().requires_grad_() for each in inputs]
    output = module(*given)
    leaves = [*(each for each in given if each is not None), *module.parameters()]
    return [output.detach(), *torch.autograd.grad(output, leaves, output.detach().tanh())]
