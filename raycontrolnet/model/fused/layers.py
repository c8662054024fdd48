"""Layers of a base model and its ControlNet in the shape that a GPU runs fastest, with PyTorch's results.

On an H200 a step of Stable Diffusion 1.5 (batch 48, bf16) spent a quarter of its time on turning images from one memory
layout to the other, and on reading across them: PyTorch's group norm (before 2.14) and diffusers' transformers leave
images channels-first, convolutions want them channels-last. GEGLU took three passes over its input, and six for the
gradient; every bias of a convolution, SiLU and cast took one more. Names, weights and files stay as they are.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from raycontrolnet.model.components import Components
from raycontrolnet.model.fused.attention import PlainAttention, is_plain_attention
from raycontrolnet.model.fused.embeddings import FusedConditioningEmbedding, is_plain_embedding
from raycontrolnet.model.fused.norms import ChannelsLastGroupNorm
from raycontrolnet.model.fused.resnets import FusedResnetBlock2D, is_plain_block
from raycontrolnet.model.fused.transformers import (
    ChannelsLastTransformer2DModel,
    FusedGEGLU,
    FusedTransformerBlock,
    is_plain_transformer,
)
from raycontrolnet.model.fused.trials import trials, with_gradients
from raycontrolnet.model.performance import tf32
from raycontrolnet.text import error_message

logger = logging.getLogger(__name__)

TRIED = (2, 320, 12, 12)
"""Shape of the images on which the kernels are tried: no multiple of what a program holds, but of 16 as the numbers of
models are, for which Triton compiles the same kernels."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference from PyTorch's results in fp32, by the norm."""


FUSED = {
    torch.nn.GroupNorm: ChannelsLastGroupNorm,
    ResnetBlock2D: FusedResnetBlock2D,
    GEGLU: FusedGEGLU,
    Transformer2DModel: ChannelsLastTransformer2DModel,
    BasicTransformerBlock: FusedTransformerBlock,
    Attention: PlainAttention,
    ControlNetConditioningEmbedding: FusedConditioningEmbedding,
}
"""Layer's class -> that of the fused one, for those with plain settings."""
PLAIN_CLASSES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {fused: plain for plain, fused in FUSED.items()}

PLAIN: dict[type[torch.nn.Module], Callable[[Any], bool]] = {
    torch.nn.GroupNorm: lambda norm: norm.affine,
    ResnetBlock2D: is_plain_block,
    Attention: is_plain_attention,
    BasicTransformerBlock: is_plain_transformer,
    ControlNetConditioningEmbedding: is_plain_embedding,
}
"""Layer's class -> check for the settings that its fused one has."""


def fuse_layers(components: Components) -> None:
    """Let the denoiser and the ControlNet on a GPU run fused layers, if these work there; else leave them, and log why.

    Triton compiles its kernels at their first call, for which it needs a C compiler.
    """
    weight = next(components.denoiser.parameters())
    if problem := problem_of_kernels(weight.device, weight.dtype):
        logger.warning("training goes on with PyTorch's layers, more slowly: fused ones cannot run here: %s", problem)
        return
    use_fused_layers(components)


def use_fused_layers(components: Components) -> None:
    """Give the denoiser's and the ControlNet's layers the classes of fused ones, without a look at their kernels."""
    for model in (components.denoiser, components.controlnet):
        for module in model.modules():
            if fused := fused_class(module):
                module.__class__ = fused


@contextmanager
def plain_layers(*models: torch.nn.Module) -> Iterator[None]:
    """Give fused layers their own classes back while the `with` block runs, so that each layer within is called."""
    fused = [(module, type(module)) for model in models for module in model.modules() if type(module) in PLAIN_CLASSES]
    for module, kind in fused:
        module.__class__ = PLAIN_CLASSES[kind]
    try:
        yield
    finally:
        for module, kind in fused:
            module.__class__ = kind


def fused_class(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """Return the class to give to a layer; None if there is none for it."""
    check = PLAIN.get(type(module))
    return FUSED.get(type(module)) if check is None or check(module) else None


def problem_of_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Try the kernels beside PyTorch's layers on a few numbers, and return what is wrong with them, if anything is."""
    for trial in trials(TRIED):
        layer, inputs = trial.to(device, dtype, dtype)
        fused = fused_class(layer)
        assert fused
        with tf32(allowed=False):  # cuDNN may take it for one layout and not for the other
            expected = with_gradients(copy.deepcopy(layer).float(), *(each.float() for each in inputs))
            layer.__class__ = fused
            try:
                found = with_gradients(layer, *inputs)
            except Exception as error:  # noqa: BLE001 (of Triton, of its compiler, of the driver)
                return f"{type(error).__name__}: {error_message(error, 200)}"
        for one, other in zip(expected, found, strict=True):
            off = float((one.float() - other.float()).norm() / one.float().norm())
            if not off <= TOLERANCE[dtype]:
                return f"{type(layer).__name__} differs from PyTorch's by a share of {off:.2g}"
    return None
