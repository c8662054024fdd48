"""The number of kernels that Triton compiles before the first update, counted on shapes and without Triton."""

from __future__ import annotations

import pytest
import torch
from full_size import SD15
from kernel_calls import Variant, launches_noted
from predictions import predicted

from raycontrolnet.model.fused.layers import TRIED, fused_class
from raycontrolnet.model.fused.trials import trials, with_gradients

MOST = 40
"""Kernels of SD 1.5 at 512 px in bf16: 38. With each size a constant there were over a hundred: 36 s on an H200."""
OF_TRIALS = 8
"""Kernels that the trials at the start need besides."""


def test_a_kernel_is_compiled_for_dtypes_and_not_for_sizes() -> None:
    compiled: set[Variant] = set()
    with launches_noted(lambda kernel, arguments: compiled.add(Variant.of(kernel, arguments)), batch_size=48):
        predicted(SD15, torch.bfloat16, on_gpu=True, mixed_precision="bf16")
        assert len({variant.name for variant in compiled}) == 13, "all kernels were needed"
        assert len(compiled) <= MOST
        for trial in trials(TRIED):
            layer, inputs = trial.to(torch.device("cpu"), torch.bfloat16, torch.bfloat16)
            layer.__class__ = fused_class(layer) or pytest.fail("it is plain")
            with_gradients(layer, *inputs)
    assert len(compiled) <= MOST + OF_TRIALS
