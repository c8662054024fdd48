"""Launches of the fused layers' kernels on shapes, noted without Triton and without a GPU; what it would compile."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch

from raycontrolnet.predict import count

FUSED = "raycontrolnet.model.fused"
WITH_KERNELS = ("biased_silu", "group_norm", "geglu", "layer_norm", "residual")


class Kernel:
    """A kernel of Triton's, of which a launch is noted."""

    def __init__(self, function: Callable[..., Any], unspecialized: Sequence[str]) -> None:
        self.name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        self.parameters = tuple(inspect.signature(function).parameters.values())
        self.unspecialized = unspecialized
        self.note: Callable[..., None]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.note(self, arguments)


@dataclass(frozen=True)
class Variant:
    """All that Triton compiles a kernel for; another launch that agrees in it compiles nothing."""

    name: str
    """Its module and function, `module.function`."""
    types: tuple[tuple[str, str], ...]
    """Types of the parameters, as Triton writes them."""
    constants: tuple[tuple[str, Any], ...]
    """Values of the constants, among them sizes of 1."""
    divisible: tuple[str, ...]
    """Addresses and sizes that are multiples of 16."""

    @classmethod
    def of(cls, kernel: Kernel, arguments: Sequence[Any]) -> Variant:
        types: dict[str, str] = {}
        constants: dict[str, Any] = {}
        divisible: list[str] = []
        for parameter, value in zip(kernel.parameters, arguments, strict=True):
            name, specialized = parameter.name, parameter.name not in kernel.unspecialized
            if parameter.annotation == "tl.constexpr" or (type(value) is int and value == 1 and specialized):
                types[name], constants[name] = "constexpr", value
                continue
            types[name] = _POINTERS[value.dtype] if isinstance(value, torch.Tensor) else _NUMBERS[type(value)]
            if isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0 and specialized):
                divisible.append(name)
        return cls(kernel.name, tuple(types.items()), tuple(constants.items()), tuple(divisible))


_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_NUMBERS = {int: "i32", float: "fp32"}


@contextmanager
def launches_noted(note: Callable[[Kernel, tuple[Any, ...]], None], batch_size: int) -> Iterator[None]:
    """Call `note` with the kernel and the arguments of each launch; predictions count a step of `batch_size` inside."""

    def jit(function: Callable[..., Any] | None = None, *, do_not_specialize: Sequence[str] = ()) -> Any:
        if function is None:
            return lambda function: jit(function, do_not_specialize=do_not_specialize)
        kernel = Kernel(function, do_not_specialize)
        kernel.note = note
        return kernel

    triton, language = ModuleType("triton"), ModuleType("triton.language")
    vars(triton).update(jit=jit, language=language)
    package, names = importlib.import_module(FUSED), [f"{each}_kernels" for each in ("shared", *WITH_KERNELS)]
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch.object(package, name, None, create=True))  # which the import sets
            stack.enter_context(_module(f"{FUSED}.{name}", None))
        with (
            _module("triton", triton),
            _module("triton.language", language),
        ):  # no longer: torch would take it for Triton
            for name in names:
                importlib.import_module(f"{FUSED}.{name}")
        for name in WITH_KERNELS:
            stack.enter_context(patch(f"{FUSED}.{name}.has_data", lambda tensor: True))
        stack.enter_context(patch.object(count, "MARK", batch_size))
        yield


@contextmanager
def _module(name: str, module: ModuleType | None) -> Iterator[None]:
    """Let a module be imported as another one, or anew; `patch.dict` would forget all that is imported meanwhile."""
    before = sys.modules.pop(name, None)
    if module:
        sys.modules[name] = module
    try:
        yield
    finally:
        sys.modules.pop(name, None)
        if before:
            sys.modules[name] = before
