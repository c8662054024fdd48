"""Precision, memory and kernels: the working dtype, TF32, checkpointing, attention, compilation, the VAE's place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from raycontrolnet.errors import UserError
from raycontrolnet.model.components import Components
from raycontrolnet.text import error_message


def working_precision(mixed_precision: str | None) -> torch.dtype:
    """Return the dtype of the frozen models."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision or "no", torch.float32)


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
def fastest_convolutions(device: torch.device) -> Iterator[None]:
    """Let cuDNN try its algorithms once for every shape, of which a run has few, and take the fastest.

    On another start it may take another one, which rounds otherwise.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def attention_kernels(components: Components) -> tuple[str, ...]:
    """Return the names of the kernels that the denoiser's attention runs in, as xformers or flash_attention.

    PyTorch picks one by device, dtype and head size (`torch.nn.attention.SDPBackend`).
    """
    layers = [each for each in components.denoiser.modules() if hasattr(each, "heads") and hasattr(each, "inner_dim")]
    if any("XFormers" in type(each.processor).__name__ for each in layers):
        return ("xformers",)
    weight = next(components.denoiser.parameters())
    found = set[str]()
    for size in {each.inner_dim // each.heads for each in layers}:
        query = torch.empty(1, 1, 64, size, dtype=weight.dtype, device=weight.device, requires_grad=True)
        # Private: what scaled_dot_product_attention itself asks; no public name tells it.
        choice = torch._fused_sdp_choice(query, query, query)
        found.add(torch.nn.attention.SDPBackend(choice).name.lower())
    return tuple(sorted(found))


COMPILER = "inductor"
"""torch.compile's backend."""
COMPILED_VARIANTS = 64
"""Batch sizes, resolutions and precisions for which a process may compile: those of a sweep's trials."""


def compile_models(components: Components) -> None:
    """Compile the denoiser's and the ControlNet's forward pass, each as one graph; before accelerate wraps them.

    Models of the same class and settings, as those of a sweep's trials, share what was compiled.
    """
    import torch._dynamo.config

    # Functions that remember libraries' versions; and a look of Dynamo itself at the residuals.
    for harmless in ("Dynamo detected a call to a `functools.lru_cache`-wrapped", "The .grad attribute of a Tensor"):
        warnings.filterwarnings("ignore", message=harmless)
    torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
    for module in (components.denoiser, components.controlnet):
        # Not `Module.compile`: accelerate's wrapping would be in the graph, and differ from trial to trial.
        module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False, backend=COMPILER)


def uncompiled(*, compiled: bool) -> AbstractContextManager[None]:
    """Run models as they are for a while, if they are compiled: for batches of other shapes than the step's."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def vae_on(components: Components, device: torch.device) -> Iterator[None]:
    """Keep the VAE on `device` for a while, then bring it back."""
    before = components.vae.device
    components.vae.to(device)
    try:
        yield
    finally:
        components.vae.to(before)
