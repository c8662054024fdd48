"""All checks of the step by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import correctness
import speedups
import torch
from correctness import CPU, Result
from full_size import TINY
from states import components_of, settings

NAMES = (
    "fp32 is the CPU's", "bf16 gradients", "gradient checkpointing", "exact resume", "fp16 gradients",
    "exact resume in fp16", "the loss scaler skips", "no synchronisation", "CUDA graphs",
    "averaged gradients", "fused layers", "compiled", "copied checkpoint", "exact resume of 8-bit Adam",
)  # fmt: skip
"""All checks; the last ten need a GPU, and the very last bitsandbytes."""


def checks(device: torch.device) -> dict[str, Callable[[], Result]]:
    """Return name -> check, for those that this kind of device has."""
    base = components_of(TINY, settings(), CPU, cached=False)
    found: dict[str, Callable[[], Result]] = {
        "fp32 is the CPU's": lambda: correctness.fp32_is_the_cpus(base, device),
        "bf16 gradients": lambda: correctness.half_precision(base, device, "bf16"),
        "gradient checkpointing": lambda: correctness.gradient_checkpointing(base, device),
        "exact resume": lambda: correctness.exact_resume(base, device, "bf16"),
    }
    if device.type == "cuda":
        found |= {
            "fp16 gradients": lambda: correctness.half_precision(base, device, "fp16"),
            "exact resume in fp16": lambda: correctness.exact_resume(base, device, "fp16"),
            "the loss scaler skips": lambda: correctness.loss_scaler_skips(base, device),
            "no synchronisation": lambda: correctness.no_synchronisation(base, device),
            "CUDA graphs": lambda: speedups.cuda_graphs(base, device),
            "averaged gradients": lambda: speedups.averaged_gradients(base, device),
            "fused layers": lambda: speedups.fused(base, device),
            "compiled": lambda: speedups.compiled(base, device),
            "copied checkpoint": lambda: correctness.copied_checkpoint(base, device),
        }
        if find_spec("bitsandbytes"):
            found[NAMES[-1]] = lambda: correctness.exact_resume(base, device, "bf16", use_8bit_adam=True)
    return found
