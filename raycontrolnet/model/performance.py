"""Precision, memory and kernels: the working dtype, TF32, checkpointing, attention, compilation, the VAE's place."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from raycontrolnet.errors import UserError, out_of_memory
from raycontrolnet.model.components import Components
from raycontrolnet.text import error_message

CONTEXT_BYTES = 2**29
"""Memory of a process on a GPU that torch does not count: CUDA's context and the kernels' code."""
_FUSED = "raycontrolnet.model.fused."
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
            module.enable_gradient_checkpointing(_recomputed if _is_deterministic(module) else None)
        if xformers:
            try:
                module.enable_xformers_memory_efficient_attention()
            except (ImportError, ModuleNotFoundError, ValueError, NotImplementedError) as error:
                raise UserError(
                    f"--enable_xformers_memory_efficient_attention: {error_message(error, 200)}; "
                    "needs a CUDA GPU and pip install 'raycontrolnet[xformers]'"
                ) from error


def _recomputed(module: torch.nn.Module, *inputs: Any) -> Any:
    """Call a module whose activations are computed again for the backward pass, without the state of the generators.

    That is read from the device, for which a CUDA graph cannot wait.
    """
    return checkpoint(module.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)


def _is_deterministic(model: torch.nn.Module) -> bool:
    """Check that a model draws nothing at random when it trains."""
    return not any(isinstance(each, _DropoutNd) and each.p > 0 for each in model.modules())


def allow_tf32(*, allowed: bool) -> None:
    """Let GPUs use TF32, with 10 bits of mantissa, in matrix products and convolutions, or in neither.

    Left alone, PyTorch allows it to convolutions.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def tf32(*, allowed: bool) -> Iterator[None]:
    """Allow TF32 or not, as `allow_tf32`, for a while."""
    flags, kinds = _tf32_flags(), _kinds_with_precision()
    precisions = [kind.fp32_precision for kind in kinds]
    if flags:
        allow_tf32(allowed=allowed)
    else:
        for kind in kinds:
            kind.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        if flags:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, of_products = flags
            if of_products == "medium":  # which the flag has made "high"
                torch.set_float32_matmul_precision(of_products)
        for kind, precision in zip(kinds, precisions, strict=True):
            kind.fp32_precision = "none"  # then a wider setting counts again, if it did before
            if kind.fp32_precision != precision:
                kind.fp32_precision = precision


def _tf32_flags() -> tuple[bool, bool, str] | None:
    """Return both flags of TF32, and the older name of the products' precision; None if PyTorch does not read these.

    So it is once this process has used `fp32_precision`, of PyTorch 2.9.
    """
    if getattr(torch.backends.cudnn, "fp32_precision", "none") != "none":  # or that of torch.backends, wider still
        return None
    try:
        flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        return *flags, torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _kinds_with_precision() -> list[Any]:
    """Return the kinds of kernels that have an `fp32_precision`: none before PyTorch 2.9."""
    cudnn: Any = torch.backends.cudnn
    if not hasattr(cudnn, "fp32_precision"):
        return []
    return [torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn]


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
def fastest_convolutions(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Let cuDNN try its algorithms once for every shape, of which a run has few, and take the fastest.

    On another start it may take another one, which rounds otherwise.

    Args:
        dtype: in which the models compute. In fp32 nothing is tried: the trial took 61 GiB, where a step needs 16.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = device.type == "cuda" and dtype != torch.float32
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def kernels_used(components: Components) -> dict[str, Any]:
    """Return what run.json says of the kernels of a training step."""
    return {"attention": attention_kernels(components), "fused_layers": fused_layers(components)}


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


def fused_layers(components: Components) -> tuple[str, ...]:
    """Return the names of the classes of `model.fused` that the denoiser's and the ControlNet's layers have."""
    classes = {type(module) for model in (components.denoiser, components.controlnet) for module in model.modules()}
    return tuple(sorted(each.__name__ for each in classes if each.__module__.startswith(_FUSED)))


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
    components.compiled = True


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
