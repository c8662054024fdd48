"""The number of kernels that Triton compiles before the first update, counted on shapes and without Triton."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from full_size import SD15
from kernel_calls import Kernel, launches_noted
from predictions import predicted

from raycontrolnet.model.fused.layers import TRIED, fused_class
from raycontrolnet.model.fused.trials import trials, with_gradients

MOST = 40
"""Kernels of SD 1.5 at 512 px in bf16: 38. With each size a constant there were over a hundred: 36 s on an H200."""
OF_TRIALS = 8
"""Kernels that the trials at the start need besides."""


def test_a_kernel_is_compiled_for_dtypes_and_not_for_sizes() -> None:
    compiled: set[Any] = set()

    def note(kernel: Kernel, arguments: tuple[Any, ...]) -> None:
        kinds = (
            value if parameter.annotation == "tl.constexpr" else _kind(value, parameter.name in kernel.unspecialized)
            for parameter, value in zip(kernel.parameters, arguments, strict=True)
        )
        compiled.add((kernel.name, *kinds))

    with launches_noted(note, batch_size=48):
        predicted(SD15, torch.bfloat16, on_gpu=True, mixed_precision="bf16")
        assert len({name for name, *_ in compiled}) == 13, "all kernels were needed"
        assert len(compiled) <= MOST
        for trial in trials(TRIED):
            layer, inputs = trial.to(torch.device("cpu"), torch.bfloat16, torch.bfloat16)
            layer.__class__ = fused_class(layer) or pytest.fail("it is plain")
            with_gradients(layer, *inputs)
    assert len(compiled) <= MOST + OF_TRIALS


def _kind(value: Any, unspecialized: bool) -> Any:
    """Return what of a value Triton compiles into a kernel: a dtype, and that an integer is 1 or a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return (value == 1, value % 16 == 0) if isinstance(value, int) and not unspecialized else type(value)
