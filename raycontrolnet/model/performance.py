"""Precision and memory: the working dtype, TF32, gradient checkpointing, xformers, and the VAE's place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raycontrolnet.errors import UserError
from raycontrolnet.model.components import Components
from raycontrolnet.text import error_message


def working_precision(mixed_precision: str | None) -> torch.dtype:
    """Return the dtype of the frozen models."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision or "no", torch.float32)


def has_bf16() -> bool:
    """Check whether the GPU of this process computes in bf16, without emulating it."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def enable_memory_savers(components: Components, *, gradient_checkpointing: bool, xformers: bool) -> None:
    """Enable gradient checkpointing and xformers attention, in the ControlNet and the denoiser it is trained through.

    Raises:
        UserError: if xformers cannot run here.
    """
    for module in (components.denoiser, components.controlnet):
        if gradient_checkpointing:
            module.enable_gradient_checkpointing()
        if xformers:
            try:
                module.enable_xformers_memory_efficient_attention()
            except (ImportError, ModuleNotFoundError, ValueError, NotImplementedError) as error:
                raise UserError(
                    f"--enable_xformers_memory_efficient_attention: {error_message(error, 200)}; "
                    "needs a CUDA GPU and pip install 'raycontrolnet[xformers]'"
                ) from error


def allow_tf32(*, allowed: bool) -> None:
    """Let GPUs use TF32, with 10 bits of mantissa, in matrix products and convolutions, or in neither.

    Left alone, PyTorch allows it to convolutions.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Allow TF32 or not, as `allow_tf32`, for a while."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if _precisions_are_set():
        precisions = matmul.fp32_precision, cudnn.conv.fp32_precision
        matmul.fp32_precision = cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision, cudnn.conv.fp32_precision = precisions
        return
    flags = matmul.allow_tf32, cudnn.allow_tf32
    allow_tf32(allowed=allowed)
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = flags


def _precisions_are_set() -> bool:
    """Check whether this process has used `fp32_precision`, of PyTorch 2.9, beside which flags cannot be read."""
    try:
        _ = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        return True
    return getattr(torch.backends, "fp32_precision", "none") != "none"


@contextmanager
def vae_on(components: Components, device: torch.device) -> Iterator[None]:
    """Keep the VAE on `device` for a while, then bring it back."""
    before = components.vae.device
    components.vae.to(device)
    try:
        yield
    finally:
        components.vae.to(before)
