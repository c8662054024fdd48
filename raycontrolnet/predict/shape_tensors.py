"""Tensors that have a shape, a type and a size in memory, but no data, and the mode in which models run on them.

torch's own FakeTensorMode decides the result of every operator, so that attention, autocast and memory formats are
those of a CPU. It takes a third of a millisecond each time, and several for some, and a model calls the same operators
with the same shapes again and again: here each is asked once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

CPU = torch.device("cpu")


class Memory:
    """The memory of a tensor and of its views."""

    __slots__ = ("__weakref__", "num_bytes")

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes


class ShapeTensor(torch.Tensor):
    """A tensor on the CPU without data."""

    memory: Memory

    @staticmethod
    def of(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, memory: Memory) -> ShapeTensor:
        """Make a tensor in `memory`."""
        make: Callable[..., Any] = torch.Tensor._make_wrapper_subclass
        tensor: ShapeTensor = make(ShapeTensor, shape, strides=strides, dtype=dtype, device=CPU)
        tensor.memory = memory
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError("a tensor without data was used outside of its mode")


class _Result(NamedTuple):
    """One tensor that an operator returns."""

    argument: int | None
    """Index among the tensors of its arguments, of which it is a view or which it is; None for new memory."""
    same: bool
    """It is that argument itself."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int


class ShapeMode(TorchDispatchMode):
    """Runs operators on shapes alone. Those on real tensors alone, as of a noise schedule's tables, are computed."""

    def __init__(self) -> None:
        super().__init__()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._fake.cache_enabled = False  # ours is asked before
        self._known: dict[Hashable, Any] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Tell torch that nothing is compiled in this mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[torch.Tensor] = []
        key = (func, torch.get_default_dtype(), *_keys(args, tensors), *_keys(sorted(kwargs.items()), tensors))
        if tensors and not any(isinstance(tensor, ShapeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        if key not in self._known:
            self._known[key] = self._ask(func, args, kwargs)
        found = self._known[key]
        if isinstance(found, _Result):
            return _tensor(found, tensors)
        if isinstance(found, (list, tuple)):
            return type(found)(_tensor(each, tensors) if isinstance(each, _Result) else each for each in found)
        return found

    def _ask(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what an operator returns: results in place of tensors."""
        fakes: list[torch.Tensor] = []

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CPU)
            fakes.append(made)
            return made

        def result(tensor: torch.Tensor) -> _Result:
            place = tensor.untyped_storage()._cdata
            same = next((index for index, other in enumerate(fakes) if other is tensor), None)
            shared = (index for index, other in enumerate(fakes) if other.untyped_storage()._cdata == place)
            return _Result(
                next(shared, None) if same is None else same, same is not None,
                tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.untyped_storage().nbytes(),
            )  # fmt: skip

        with self._fake:
            fake_args, fake_kwargs = tree_map_only(torch.Tensor, fake, (tuple(args), dict(sorted(kwargs.items()))))
            returned = func(*fake_args, **fake_kwargs)
            return tree_map_only(torch.Tensor, result, returned)


def _tensor(result: _Result, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    if result.argument is None:
        return ShapeTensor.of(result.shape, result.strides, result.dtype, Memory(result.num_bytes))
    argument = tensors[result.argument]
    if result.same:
        return argument
    memory = argument.memory if isinstance(argument, ShapeTensor) else Memory(argument.untyped_storage().nbytes())
    return ShapeTensor.of(result.shape, result.strides, result.dtype, memory)


def _keys(values: Sequence[Any], tensors: list[torch.Tensor]) -> Iterator[Hashable]:
    """Yield what decides the results of an operator's arguments, and add their tensors to `tensors` in order."""
    for value in values:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            yield value.shape, value.stride(), value.dtype
        elif isinstance(value, (list, tuple)):
            yield tuple(_keys(value, tensors))
        else:
            yield type(value), value


def memory_of(tensor: torch.Tensor) -> tuple[Any, int]:
    """Return an object that lives as long as the memory of a tensor and of its views, and the bytes in it."""
    if isinstance(tensor, ShapeTensor):
        return tensor.memory, tensor.memory.num_bytes
    storage = tensor.untyped_storage()
    return storage, storage.nbytes()
