"""The number of kernels that Triton compiles before the first update, counted on shapes and without Triton."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from full_size import SD15
from predictions import predicted

from raycontrolnet.model.fused.layers import TRIED, fused_class
from raycontrolnet.model.fused.trials import trials, with_gradients
from raycontrolnet.predict import count

WITH_KERNELS = ("biased_silu", "group_norm", "geglu", "layer_norm", "residual")
FUSED = "raycontrolnet.model.fused"
MOST = 40
"""Kernels of SD 1.5 at 512 px in bf16: 38. With each size a constant there were over a hundred: 36 s on an H200."""
OF_TRIALS = 8
"""Kernels that the trials at the start need besides."""


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Give the set to which every kernel that a step needs is added, by what Triton compiles it for."""
    found: set[Any] = set()

    def jit(function: Callable[..., Any] | None = None, *, do_not_specialize: tuple[str, ...] = ()) -> Any:
        if function is None:
            return lambda function: jit(function, do_not_specialize=do_not_specialize)
        parameters = inspect.signature(function).parameters.values()
        name = f"{function.__module__}.{function.__name__}"

        def launched(*arguments: Any) -> None:
            kinds = (
                value if parameter.annotation == "tl.constexpr" else _kind(value, parameter.name in do_not_specialize)
                for parameter, value in zip(parameters, arguments, strict=True)
            )
            found.add((name, *kinds))

        return Kernel(launched)

    triton, language = ModuleType("triton"), ModuleType("triton.language")
    vars(triton).update(jit=jit, language=language)
    package = importlib.import_module(FUSED)
    with monkeypatch.context() as importing:  # no longer: torch would take them for Triton
        importing.setitem(sys.modules, "triton", triton)
        importing.setitem(sys.modules, "triton.language", language)
        for name in (f"{each}_kernels" for each in WITH_KERNELS):
            importing.delitem(sys.modules, f"{FUSED}.{name}", raising=False)
            monkeypatch.setattr(package, name, None, raising=False)  # which the import sets
            importlib.import_module(f"{FUSED}.{name}")
            del sys.modules[f"{FUSED}.{name}"]
    for name in WITH_KERNELS:
        monkeypatch.setitem(sys.modules, f"{FUSED}.{name}_kernels", getattr(package, f"{name}_kernels"))
        monkeypatch.setattr(f"{FUSED}.{name}.has_data", lambda tensor: True)
    monkeypatch.setattr(count, "MARK", 48)
    return found


class Kernel(SimpleNamespace):
    """A kernel whose launch is noted."""

    def __init__(self, launched: Callable[..., None]) -> None:
        super().__init__(launched=launched)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launched


def _kind(value: Any, unspecialized: bool) -> Any:
    """Return what of a value Triton compiles into a kernel: a dtype, and that an integer is 1 or a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return (value == 1, value % 16 == 0) if isinstance(value, int) and not unspecialized else type(value)


def test_a_kernel_is_compiled_for_dtypes_and_not_for_sizes(compiled: set[Any]) -> None:
    predicted(SD15, torch.bfloat16, on_gpu=True, mixed_precision="bf16")
    assert len({name for name, *_ in compiled}) == 13, "all kernels were needed"
    assert len(compiled) <= MOST
    for trial in trials(TRIED):
        layer, inputs = trial.to(torch.device("cpu"), torch.bfloat16, torch.bfloat16)
        layer.__class__ = fused_class(layer) or pytest.fail("it is plain")
        with_gradients(layer, *inputs)
    assert len(compiled) <= MOST + OF_TRIALS
