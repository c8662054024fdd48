"""Memory of a process that trains on a CPU: what is freed is kept for the next step, not given back to the system.

glibc's `malloc` maps every large tensor anew and unmaps it when it is freed, and the kernel clears its pages each
time: 2 million page faults in an update of Stable Diffusion 1.5. See mallopt(3).
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from raycontrolnet.cluster.cpus import variables_for_threads
from raycontrolnet.cluster.environment import unless_chosen

PARAMETERS = {
    # First: a thread's own arena, as that of a worker's loop on Ray, maps all that is larger than 64 MiB in any case.
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_MAX_": (-4, 0),
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_TOP_PAD_": (-2, 2**28),
}
"""By the variables that set them at a process's start: their numbers in malloc.h, and our values, of which two are
bytes."""


def variables_of_workers() -> dict[str, str]:
    """Return the environment variables for the processes of workers on CPUs."""
    return variables_for_kept_memory() | variables_for_threads()


def variables_for_kept_memory(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that let a process keep freed memory; none if the user has set one of them."""
    return unless_chosen({name: str(value) for name, (_, value) in PARAMETERS.items()}, environment)


@contextmanager
def freed_memory_kept(*, on_cpu: bool) -> Iterator[bool]:
    """Keep freed memory from here on, and give back once what is free when the `with` block ends.

    Not on GPUs, where tensors are elsewhere; nor with another C library than glibc, or where the user has chosen. In a
    thread that has an arena already, only `variables_for_kept_memory` serve the largest tensors.

    Yields:
        Whether it is kept.
    """
    if not on_cpu or platform.libc_ver()[0] != "glibc" or not variables_for_kept_memory():
        yield False
        return
    libc = ctypes.CDLL(None)
    done = [libc.mallopt(number, value) for number, value in PARAMETERS.values()]
    try:
        yield all(done)
    finally:
        libc.malloc_trim(0)
