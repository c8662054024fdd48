"""A copy of a run's state in host memory, from which a checkpoint is written while the training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from raycontrolnet.training.state import StateParts

TensorPath = tuple[object, ...]
"""Keys and numbers that lead to a tensor in nested ones."""


class HostCopy:
    """A copy of nested tensors in host memory, which the next copy uses again."""

    def __init__(self) -> None:
        self._buffers: dict[TensorPath, torch.Tensor] = {}

    def of(self, parts: StateParts) -> StateParts:
        """Return `parts` with their tensors copied, as they are now."""
        copied: StateParts = _map_tensors(parts, self._copied)
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.current_stream().synchronize()
        return copied

    def bytes_to_come(self, parts: StateParts) -> int:
        """Return the bytes that a copy would take besides what it has."""
        sizes: list[int] = []

        def add(path: TensorPath, value: torch.Tensor) -> None:
            if not self._fits(path, value):
                sizes.append(_bytes_in_host(value))

        _map_tensors(parts, add)
        return sum(sizes)

    def _copied(self, path: TensorPath, value: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to its buffer; pinned for one on a GPU, from which it is then copied at full speed."""
        if not self._fits(path, value):
            self._buffers[path] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return self._buffers[path].copy_(value.detach(), non_blocking=True)

    def _fits(self, path: TensorPath, value: torch.Tensor) -> bool:
        buffer = self._buffers.get(path)
        return buffer is not None and buffer.shape == value.shape and buffer.dtype == value.dtype


def _map_tensors(value: Any, replace: Callable[[TensorPath, torch.Tensor], Any], path: TensorPath = ()) -> Any:
    """Return nested mappings, lists and tuples with each tensor replaced by what `replace` returns for it.

    Not torch's pytree, which takes a mapping of a class that it does not know, as of an optimizer, for a leaf.
    """
    if isinstance(value, torch.Tensor):
        return replace(path, value)
    if isinstance(value, Mapping):
        return {key: _map_tensors(each, replace, (*path, key)) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        found = [_map_tensors(each, replace, (*path, n)) for n, each in enumerate(value)]
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    return value


def _bytes_in_host(value: torch.Tensor) -> int:
    """Return the bytes of a tensor's copy; PyTorch rounds pinned memory up to powers of two."""
    size = value.nbytes
    return 1 << (size - 1).bit_length() if value.is_cuda and size else size
