"""Memory of a machine and of its containers, as Linux tells it: files made here stand in for the kernel's."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from raycontrolnet.cluster import machine_memory
from raycontrolnet.cluster.machine_memory import available_bytes, host_bytes

MACHINE, AVAILABLE = 8000, 5000
VERSION_2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")
VERSION_1 = (
    "memory/memory.limit_in_bytes",
    "memory/memory.usage_in_bytes",
    "memory/memory.stat",
    "total_inactive_file",
)


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in which the kernel would tell of a container, on a machine of 8,000 bytes with 5,000 left."""
    sizes = {"SC_PAGE_SIZE": 10, "SC_PHYS_PAGES": MACHINE // 10}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=AVAILABLE))
    monkeypatch.setattr(machine_memory, "CGROUP", tmp_path)
    return tmp_path


def test_without_a_container_it_is_the_machines(container: Path) -> None:
    assert (host_bytes(), available_bytes()) == (MACHINE, AVAILABLE)


@pytest.mark.parametrize("names", [VERSION_2, VERSION_1])
@pytest.mark.parametrize(
    ("limit", "most", "left"),
    [
        ("3000", 3000, 1100),  # what the kernel keeps of files that were read gives way
        ("7500", 7500, AVAILABLE),
        ("max", MACHINE, AVAILABLE),
        ("9223372036854771712", MACHINE, AVAILABLE),  # version 1 without a limit
    ],
)
def test_a_container_limits_it(container: Path, names: tuple[str, ...], limit: str, most: int, left: int) -> None:
    texts = (f"{limit}\n", "2000\n", f"anon 1900\n{names[3]} 100\n")
    for name, text in zip(names[:3], texts, strict=True):
        (container / name).parent.mkdir(exist_ok=True)
        (container / name).write_text(text)
    assert (host_bytes(), available_bytes()) == (most, left)


def test_a_limit_without_its_use_still_counts(container: Path) -> None:
    (container / "memory.max").write_text("3000\n")
    assert (host_bytes(), available_bytes()) == (3000, AVAILABLE)
