"""Precision and memory: the working dtype, TF32, gradient checkpointing, xformers, and the VAE's place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raycontrolnet.errors import UserError, out_of_memory
from raycontrolnet.model.components import Components
from raycontrolnet.text import error_message

CONTEXT_BYTES = 2**29
"""Memory of a process on a GPU that torch does not count: CUDA's context and the kernels' code."""
_NO_MEMORY = re.compile(
    r"(CUDA|HIP) (error: )?out of memory|hipErrorOutOfMemory|Cuda failure.*out of memory|"
    r"(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CUFFT|HIPBLAS|MIOPEN)\w*_ALLOC_FAILED"
)
"""In errors of CUDA and its libraries, beside those of torch's own allocator."""


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


def memory_fraction(share: float, total_bytes: int) -> float:
    """Return the part of a GPU's memory that torch may take for a `share` of the GPU, with CUDA's own needs left out.

    At least half of the share, on a GPU that is small.
    """
    return max(share - CONTEXT_BYTES / total_bytes, share / 2)


@contextmanager
def memory_share(device: torch.device, share: float) -> Iterator[None]:
    """Keep this process to its `share` of the GPU's memory for a while: more raises `torch.OutOfMemoryError`."""
    if device.type != "cuda" or share >= 1:
        yield
        return
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(memory_fraction(share, total_bytes), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def is_out_of_memory(error: BaseException) -> bool:
    """Check for an error that says that a GPU's memory is full, of torch or of CUDA's libraries; not the host's."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


@contextmanager
def memory_advised(advice: Callable[[], str]) -> Iterator[None]:
    """Turn an error of a full GPU into the failure to tell of, with `advice`.

    Raises:
        RunError: the GPU's memory is full.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, advice()) from error


@contextmanager
def vae_on(components: Components, device: torch.device) -> Iterator[None]:
    """Keep the VAE on `device` for a while, then bring it back."""
    before = components.vae.device
    components.vae.to(device)
    try:
        yield
    finally:
        components.vae.to(before)
