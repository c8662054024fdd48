"""Heads of Ray that a command has started on this machine, with ports and processes of their own."""

from __future__ import annotations

import random
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
from documents import run
from ray._common.utils import get_ray_address_file

PORTS = range(25000, 30000)
"""Ray hands 10002 to 19999 to its workers."""
STOP_TIMEOUT_S = 10.0


class Addresses(NamedTuple):
    head: str
    """Value for `--address` of a run."""
    dashboard: str
    """Value for `--address` of `ray job submit`."""


@contextmanager
def started_head(folder: Path, env: dict[str, str], *flags: str, port: int | None = None) -> Iterator[Addresses]:
    """Start a head by `ray start` with `flags`; at the end stop it, its nodes, and all that they have started.

    Args:
        folder: the command's.
        env: the command's environment.
        port: the head's; by default a free one.
    """
    temp_dir = tempfile.mkdtemp(prefix="rcn", dir="/tmp")  # short: Ray makes sockets below it
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    ports["port"] = port or ports["port"]
    own = [f"--{name}={port}" for name, port in ports.items()]
    command = ["ray", "start", "--head", f"--temp-dir={temp_dir}", "--disable-usage-stats", *own, *flags]
    try:
        started = run(command, folder, env)
        assert started.returncode == 0, started.stdout
        yield Addresses(f"127.0.0.1:{ports['port']}", f"http://127.0.0.1:{ports['dashboard-port']}")
    finally:
        stop_processes_of(temp_dir)
        shutil.rmtree(temp_dir, ignore_errors=True)
        # `ray stop` would remove it. While it is there, a plain `ray.init()` waits for this head without end.
        current = Path(get_ray_address_file(None))
        if current.is_file() and current.read_text().endswith(f":{ports['port']}"):
            current.unlink()


def free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


def stop_processes_of(temp_dir: str) -> None:
    """Stop what has the head's folder in its command line, and all that it started; no other Ray is touched."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline"]):
        if any(temp_dir in argument for argument in process.info["cmdline"] or ()):
            with suppress(psutil.NoSuchProcess):  # it has ended by itself
                found |= {one.pid: one for one in [process, *process.children(recursive=True)]}
    assert len(found) >= 3, "the head's processes were not found"
    for process in found.values():
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(found.values(), timeout=STOP_TIMEOUT_S)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)
    assert not alive
