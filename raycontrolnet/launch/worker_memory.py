"""The memory that a worker has: of a GPU or a part of one, or its share of a machine's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from raycontrolnet.cluster.machine_memory import host_bytes
from raycontrolnet.predict.devices import bytes_of_type


class WorkerMemory(NamedTuple):
    """The memory that a worker has."""

    bytes: float | None
    """None if it is not known."""
    is_gpu: bool
    share: float = 1.0
    """Part of the GPU, or number of workers that share the machine's memory, as 1 / number."""

    @property
    def words(self) -> str:
        if not self.is_gpu:
            return self.words_of("this machine")
        return "this GPU" if self.share == 1 else f"{self.share:.2g} of a GPU"

    def words_of(self, machine: str) -> str:
        """Return the worker's part of a machine's memory in words."""
        return machine if self.share == 1 else f"{self.share:.2g} of {machine}"


def gpu_bytes(types: Iterable[str | None]) -> float | None:
    """Return the memory of the largest GPU of some of Ray's types; None if one is unknown (None, or not listed)."""
    sizes = [bytes_of_type(kind) if kind else None for kind in types]
    known = [size for size in sizes if size is not None]
    return max(known) if known and len(known) == len(sizes) else None


def gpu_here() -> float | None:
    """Return the memory of this machine's first GPU; None if there is none. It takes a context on that GPU."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def host_share(num_workers: int) -> WorkerMemory:
    """Return the memory of each of the workers on this machine's CPUs."""
    return WorkerMemory(host_bytes() / num_workers, is_gpu=False, share=1 / num_workers)
