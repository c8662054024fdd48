"""Peak arithmetic and memory of GPUs, by their makers' data sheets."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

REACHED = (0.15, 0.35)
"""Shares of the peak between which a step is expected; a ControlNet step has many small kernels."""
PYTHON_S_PER_CALL = 30e-6
"""Seconds in which Python asks a GPU for one operator of a step: a step of Stable Diffusion 1.5 without CUDA graphs
has 6,516 and took 0.2 s, at batch 4 (20.2 images/s) as at 16 (79.9): tests/benchmarks/RESULTS.md, 2026-11-27."""


class Peak(NamedTuple):
    """Dense TFLOP/s, without sparsity."""

    half: float
    """In bf16 or fp16, accumulated in fp32."""
    tf32: float
    fp32: float

    def of(self, dtype: torch.dtype, *, allow_tf32: bool) -> float:
        """Return the peak in the precision of a run."""
        return self.half if dtype != torch.float32 else self.tf32 if allow_tf32 else self.fp32


PEAKS = {
    "B200": Peak(2250, 1125, 80),
    "H200": Peak(989, 494, 67),
    "H100 PCIe": Peak(756, 378, 51),
    "H100 NVL": Peak(835, 417, 60),
    "H100": Peak(989, 494, 67),
    "A100": Peak(312, 156, 19.5),
    "L40S": Peak(362, 183, 91.6),
    "L40": Peak(181, 90.5, 90.5),
    "L4": Peak(121, 60, 30.3),
    "A10G": Peak(70, 35, 31.5),
    "A10": Peak(125, 62.5, 31.2),
    "A40": Peak(150, 74.8, 37.4),
    "RTX A6000": Peak(155, 77.4, 38.7),
    "RTX 4090": Peak(165, 82.6, 82.6),
    "RTX 3090": Peak(71, 35.6, 35.6),
    "V100": Peak(125, 15.7, 15.7),
    "T4": Peak(65, 8.1, 8.1),
}
"""Words in a device's name, as CUDA gives it -> peak; the first that fits."""
TYPICAL = PEAKS["H100"]
"""Peaks of a GPU of which nothing is known; an A100's have the same proportions."""


def peak_of(name: str) -> Peak | None:
    """Return the peak of the device with this name; None if it is not known."""
    if "laptop" in name.lower() or "max-q" in name.lower():
        return None
    return next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)


def peak_with(tflops: float, dtype: torch.dtype, *, allow_tf32: bool) -> Peak:
    """Return the peaks of a GPU by the one in a run's precision: as listed, or else in proportion to the typical ones.

    Of several that are listed, the one that is slowest in fp32 counts.
    """
    listed = [each for each in PEAKS.values() if each.of(dtype, allow_tf32=allow_tf32) == tflops]
    share = tflops / TYPICAL.of(dtype, allow_tf32=allow_tf32)
    return min(listed, key=lambda each: each.fp32, default=Peak(*(share * each for each in TYPICAL)))


MEMORY = {
    "A100": 80, "A100-40G": 40, "A100-80G": 80, "A10G": 24, "B200": 192, "GB200": 192, "B300": 288, "GB300": 288,
    "H100": 96, "H20": 141, "H200": 141, "K80": 12, "L4": 24, "L40S": 48, "P4": 8, "P100": 16, "RTX-PRO-6000": 96,
    "T4": 16, "V100": 32,
}  # fmt: skip
"""Ray's accelerator type -> GiB of the largest GPU that is sold under this name."""


def bytes_of_type(accelerator_type: str) -> float | None:
    """Return the most memory that GPUs of a type of Ray's have; None if it is not known."""
    memory = MEMORY.get(accelerator_type)
    return memory * 2**30 if memory else None
