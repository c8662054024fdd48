"""Memory of this machine, or of the container that this process is in."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Files with a container's limit, its use and its parts, and the name of the part that gives way, in versions 2 and 1
of Linux's cgroups."""


def host_bytes() -> int:
    """Return the memory of this machine, or of the container that this process is in."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, _ = _container_bytes()
    return int(min(machine, limit))


def available_bytes() -> int:
    """Return the bytes of memory that this process may still take, of the machine or of its container."""
    import psutil

    _, left = _container_bytes()
    return int(min(psutil.virtual_memory().available, left))


def _container_bytes() -> tuple[float, float]:
    """Return a container's limit, and what is left of it; infinity where there is none, or nothing tells."""
    for limit_file, used_file, stat_file, gives_way in FILES:
        limit = left = math.inf
        with suppress(OSError, ValueError, KeyError):  # there is no such file, or the limit is "max"
            limit = int((CGROUP / limit_file).read_text())
            stat = dict(line.split() for line in (CGROUP / stat_file).read_text().splitlines())
            left = limit - int((CGROUP / used_file).read_text()) + int(stat[gives_way])
        if limit < math.inf:
            return limit, left
    return math.inf, math.inf
