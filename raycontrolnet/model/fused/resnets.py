"""diffusers' residual blocks with few passes over the images: norm and SiLU in one, biases joined with other sums."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d

from raycontrolnet.model.fused import residual
from raycontrolnet.model.fused.norms import is_channels_last, norm_before_product


class FusedResnetBlock2D(ResnetBlock2D):
    """diffusers' `ResnetBlock2D` of the settings that `is_plain_block` checks, whose output is channels-last.

    The first convolution's bias is added with the time embedding, in the norm's means; the second's and the shortcut's
    with the residual.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Of a model whose weights have the other layout, as 8-bit AdamW wants them: the rest of it follows.
        input_tensor = input_tensor.contiguous(memory_format=torch.channels_last)
        if args or kwargs or not is_channels_last(input_tensor):
            block: Tensor = super().forward(input_tensor, temb, *args, **kwargs)
            return block
        normalized, input_tensor = norm_before_product(self.norm1, input_tensor, with_silu=True)
        images = without_bias(self.conv1, normalized)
        moves = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb)) + self.conv1.bias
        images = without_bias(self.conv2, norm_before_product(self.norm2, images, with_silu=True, moves=moves)[0])
        bias = self.conv2.bias
        if self.conv_shortcut is not None:
            input_tensor = without_bias(self.conv_shortcut, input_tensor)
            if self.conv_shortcut.bias is not None:
                bias = bias + self.conv_shortcut.bias
        return add(images, input_tensor, bias)


def is_plain_block(block: ResnetBlock2D) -> bool:
    """Check for the settings of Stable Diffusion's blocks, all of whose layers are PyTorch's own."""
    convolutions = [block.conv1, block.conv2, *([] if block.conv_shortcut is None else [block.conv_shortcut])]
    return (
        block.time_embedding_norm == "default"
        and block.time_emb_proj is not None
        and block.upsample is None
        and block.downsample is None
        and type(block.nonlinearity) is torch.nn.SiLU
        and block.output_scale_factor == 1
        and block.dropout.p == 0
        and all(is_plain_convolution(each) for each in convolutions)
        and block.conv1.bias is not None
        and block.conv2.bias is not None
        and all(isinstance(norm, torch.nn.GroupNorm) and norm.affine for norm in (block.norm1, block.norm2))
    )


def is_plain_convolution(module: torch.nn.Module) -> TypeGuard[torch.nn.Conv2d]:
    """Check for PyTorch's own convolution, not one that a library has wrapped, with zeros around the image."""
    return type(module) is torch.nn.Conv2d and module.padding_mode == "zeros"


def without_bias(convolution: torch.nn.Conv2d, images: Tensor) -> Tensor:
    """Convolve, and leave out the bias."""
    layer: Any = convolution  # whose padding may be a word
    return conv2d(images, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def add(one: Tensor, other: Tensor, bias: Tensor) -> Tensor:
    """Return the sum of two images [B, C, H, W] and a bias [C]: in one pass if both are channels-last."""
    if not (is_channels_last(one) and is_channels_last(other)):
        return one + bias.to(one.dtype)[:, None, None] + other
    found: Tensor = _Sum.apply(one, other, bias)
    return found


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor, bias: Tensor) -> Tensor:
        ctx.dtypes = one.dtype, other.dtype, bias.dtype
        return residual.forward(one, other, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_one, of_other, of_bias = ctx.dtypes
        # A frozen model's biases need none.
        bias = gradient.sum((0, 2, 3), dtype=torch.float32).to(of_bias) if ctx.needs_input_grad[2] else None
        return gradient.to(of_one), gradient.to(of_other), bias
