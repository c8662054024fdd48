"""Launches of the fused layers' kernels on shapes, noted without Triton and without a GPU."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

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
