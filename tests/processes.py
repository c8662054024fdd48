"""Processes: those that a command left behind, and those that are to be killed while a run goes on."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from raycontrolnet.training import metrics

START_TIMEOUT_S = 300.0
"""For a command with a Ray of its own to be at work, on a busy machine."""


def processes_of_session(leader: int) -> list[psutil.Process]:
    """Return the processes of the session of `leader`; Ray's end a moment after their driver."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, ProcessLookupError):
            continue
    return found


class when:  # noqa: N801 (reads as a sentence)
    """Inside the `with`, do something once a condition holds; the list that it gives says whether it was done."""

    def __init__(self, condition: Callable[[], bool], action: Callable[[], None]):
        self.done: list[bool] = []
        self._over = threading.Event()
        self._condition, self._action = condition, action
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> list[bool]:
        self._thread.start()
        return self.done

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            if self._condition():
                self._action()
                self.done.append(True)
                return


def ctrl_c(
    command: list[str],
    ready: Callable[[], bool],
    *,
    whole_group: bool,
    env: Mapping[str, str] | None = None,
    number: int = signal.SIGINT,
) -> tuple[subprocess.Popen[str], str]:
    """Run `command` until it is `ready`, and interrupt it, or all processes of its terminal, with signal `number`.

    Returns:
        The process, which has ended, and what it wrote to standard error.
    """
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env)
    try:
        wait_for(ready, timeout_s=START_TIMEOUT_S)
        (os.killpg if whole_group else os.kill)(process.pid, number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return process, stderr


def kill_9(command: list[str], ready: Callable[[], object]) -> None:
    """Run `command` until it is `ready`, then kill it and its Ray."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    ) as process:
        try:
            while not ready():
                assert process.poll() is None
                time.sleep(0.01)
            children = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.kill()
    kill_all(children)  # Ray's agents would go by themselves, after a minute


def kill_all(processes: list[psutil.Process]) -> None:
    """Kill the processes with -9, and wait for their end."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def last_step(output_dir: Path) -> int:
    records = metrics.read(output_dir / metrics.METRICS_FILE)
    return int(records[-1]["step"]) if records else 0


def kill_a_train_worker() -> None:
    workers = workers_called("RayTrainWorker")
    assert len(workers) == 1
    workers[0].kill()


def kill_the_controller() -> None:
    (controller,) = workers_called("TrainController")
    controller.kill()


def workers_called(name: str, parent: int | None = None) -> list[psutil.Process]:
    """Return the processes that this one, or `parent`, has started and whose command or title holds `name`."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        with suppress(psutil.Error):  # gone meanwhile
            if name in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.1)


def start_ray(num_cpus: int = 3) -> None:
    """Start a Ray in this process: two CPUs for workers, one for loading; once more if the machine was too busy."""
    import ray

    from raycontrolnet.cluster.session import set_up_environment

    set_up_environment()
    for is_last in (False, True):
        try:
            ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
            return
        except Exception:  # Ray raises bare ones
            ray.shutdown()
            if is_last:
                raise
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                gc.collect()  # Ray's processes, which end by themselves
