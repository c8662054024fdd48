"""The processes, and the storage, that faults hit."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from random import Random

import psutil
from moments import ALL_WORKERS, CONTROLLER, COORDINATOR, DRIVER, GCS, LOADING, NODE, PREPARE, WORKER
from processes import kill_all, workers_called
from scene import Scene

Fault = Callable[[subprocess.Popen[bytes], int], None]

TITLES = {
    ALL_WORKERS: "RayTrainWorker",
    COORDINATOR: "SplitCoordinator",
    CONTROLLER: "TrainController",
    GCS: "gcs_server",
}
"""Target -> part of its process's command, or of the title that Ray gives it."""
ENCODER = "_Encoder"
LOADING_TIMEOUT_S = 30.0
AWAY_S = (2.0, 45.0)
"""The shortest and the longest outage of the storage; requests are tried for about 30 s."""


def fault_of(target: str, moment: str, scene: Scene, random: Random, away: threading.Event) -> Fault:
    """Return the fault that hits `target`; `away` lets the storage answer nothing."""
    if target == DRIVER:
        return lambda driver, _: driver.kill()  # psutil would take the exit code
    if target == LOADING:
        return lambda _, paused: kill_all([psutil.Process(paused if moment == PREPARE else _loading(scene))])
    if target == NODE:
        return lambda _, paused: _kill_node(paused)
    if target in TITLES or target == WORKER:
        return lambda driver, _: _kill_called(target, moment, driver, random)
    return lambda _, __: _go_away(away, random.uniform(*AWAY_S))


def _kill_called(target: str, moment: str, driver: subprocess.Popen[bytes], random: Random) -> None:
    workers = ENCODER if moment == PREPARE else TITLES[ALL_WORKERS]
    name = workers if target in (WORKER, ALL_WORKERS) else TITLES[target]
    found = workers_called(name, driver.pid)
    assert found, f"no process is called {name}"
    kill_all([random.choice(found)] if target == WORKER else found)


def _loading(scene: Scene) -> int:
    """Return the id of a loading task that is held."""
    end = time.monotonic() + LOADING_TIMEOUT_S
    while time.monotonic() < end:
        for file in scene.folder.glob("loading-*"):
            if psutil.pid_exists(number := int(file.name.partition("-")[2])):
                return number
        time.sleep(0.05)
    raise AssertionError("no loading task is at work")


def _kill_node(process: int) -> None:
    """Kill the raylet of a worker, and all that it has started; for the driver, that of the node that came last."""
    raylets = [parent for parent in psutil.Process(process).parents() if "raylet" in parent.name()]
    if not raylets:  # the driver is on the head
        started = [child for child in psutil.Process().children(recursive=True) if "raylet" in child.name()]
        raylets = sorted(started, key=lambda child: child.create_time(), reverse=True)
    raylet = raylets[0]
    assert raylet.pid != os.getpid()
    kill_all([raylet, *raylet.children(recursive=True)])


def _go_away(away: threading.Event, seconds: float) -> None:
    away.set()
    timer = threading.Timer(seconds, away.clear)
    timer.daemon = True
    timer.start()
