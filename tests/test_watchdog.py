"""The watchdog: a worker that hangs ends, with its stacks in the log, and is started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import last_step, when, workers_called
from runs import Settings, column, equal, run, weights

from raycontrolnet import TrainConfig, fit
from raycontrolnet.errors import RunError
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training.failures import read_hang
from raycontrolnet.training.signs_of_life import SignsOfLife
from raycontrolnet.training.watchdog import Watchdog

HANGING = """
import sys, time
from pathlib import Path
from typing import Any
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training.watchdog import Watchdog

def a_collective_that_hangs():
    time.sleep(60)

folder = Path(sys.argv[1])
watchdog = Watchdog("Worker 3", RunFolder(str(folder)), folder / "run.log", 1.0)
with watchdog.watching():
    watchdog.progress("an update")
    a_collective_that_hangs()
"""


def test_a_process_that_hangs_is_ended(tmp_path: Path) -> None:
    assert read_hang(tmp_path) is None
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGING, str(tmp_path)], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert time.monotonic() - start < 40
    assert "in a_collective_that_hangs" in (tmp_path / "run.log").read_text()
    problem = "Worker 3 hung: nothing came of an update for 0:01 (--hang_timeout_s=1): by itself, or in waiting"
    assert str(read_hang(tmp_path)) == f"{problem} for another; the stacks of its threads are in the log"


def signs_of(number: int) -> list[SignsOfLife]:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    return [SignsOfLife(rank, number, store) for rank in range(number)]


def test_a_worker_that_is_stopped_is_named_to_those_that_wait_for_it() -> None:
    signs = signs_of(3)
    assert signs[0].suspect(5, "an update", 0.2) is None, "it has not asked yet"
    signs[0].exchange(1, "the start")
    assert signs[0].suspect(1, "the start", -1) == "worker 1 has given no sign of life for 0:00", "not one since"
    for each in (*signs, *signs, signs[0]):
        each.exchange(5, "an update")
    assert signs[0].suspect(5, "an update", 0.2) is None, "all are alike"
    time.sleep(0.3)
    for rank in (0, 1, 0):  # and not 2
        signs[rank].exchange(5, "an update")
    assert signs[0].suspect(5, "an update", 0.2) == "worker 2 has given no sign of life for 0:00"
    assert signs[0].suspect(5, "an update", 60) is None


def test_a_worker_that_is_behind_is_named() -> None:
    signs = signs_of(3)
    told = [(5, "an update"), (5, "the wait for data"), (4, "a checkpoint")]
    for each, (update, doing) in [*zip(signs, told, strict=True)] * 2:
        each.exchange(update, doing)
    this = "this one is in update 5 at an update"
    assert signs[0].suspect(5, "an update", 60) == f"{this}, worker 2 in update 4 at a checkpoint"
    signs[2].exchange(5, "an update")
    signs[0].exchange(5, "an update")
    assert signs[0].suspect(5, "an update", 60) == f"{this}, worker 1 in update 5 at the wait for data"
    signs[1].exchange(4, "the wait for data")
    assert signs[1].suspect(4, "the wait for data", 60) is None, "it is behind itself"


STOPPED = """
import os, signal, sys, time
from pathlib import Path
import torch.distributed as dist
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training.signs_of_life import SignsOfLife
from raycontrolnet.training.watchdog import Watchdog

folder, rank, stopped = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
signs = SignsOfLife.of_process_group()
port = None
if rank == 0:
    server = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    (folder / "port.part").write_text(str(server.port))
    (folder / "port.part").rename(folder / "port")
    signs.store = server
else:
    while not (folder / "port").exists():
        time.sleep(0.05)
    signs.store = dist.TCPStore("127.0.0.1", int((folder / "port").read_text()), 2, is_master=False)
watchdog = Watchdog(f"Worker {rank}", RunFolder(str(folder)), folder / "run.log", 4.0, signs)
with watchdog.watching():
    time.sleep(2)
    watchdog.progress("an update")
    if rank == stopped:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
"""


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_hang_names_the_process_that_was_stopped(tmp_path: Path, stopped: int) -> None:
    """Also the one whose store it is, which answers nobody then."""
    workers = [
        subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path), str(rank), str(stopped)]) for rank in (0, 1)
    ]
    try:
        assert workers[1 - stopped].wait(100) == 1
    finally:
        workers[stopped].kill()
        workers[stopped].wait()
    said = str(read_hang(tmp_path))
    assert said.startswith(f"Worker {1 - stopped} hung: nothing came of an update for 0:04 (--hang_timeout_s=4): ")
    assert f"orker {stopped}" in said.split("): ")[1]
    assert ("no sign of life" in said) if stopped else ("has not answered for" in said)


def test_one_that_does_not_is_left_alone(tmp_path: Path) -> None:
    """Nor one that waits for its first batch, as for nodes that load data."""
    watchdog = Watchdog("Worker 0", RunFolder(str(tmp_path)), tmp_path / "run.log", 0.4)
    with watchdog.watching():
        time.sleep(0.8)
        for _ in range(8):
            watchdog.progress("an update")
            time.sleep(0.1)
    time.sleep(0.8)
    assert not (tmp_path / "run.log").exists()


@pytest.mark.usefixtures("_local_ray")
@pytest.mark.parametrize(("hang_timeout_s", "expected"), [(600.0, 1800), (3600.0, 7200), (float("inf"), 10**8)])
def test_torch_gives_a_collective_up_later(
    tiny_settings: Settings, monkeypatch: pytest.MonkeyPatch, hang_timeout_s: float, expected: int
) -> None:
    """Its error says nothing of who waits; after Ray's 1,800 s it would come before the watchdog's."""

    def trainer(*_: Any, torch_config: Any, **__: Any) -> None:
        raise RunError(f"collectives: {torch_config.timeout_s} s")

    monkeypatch.setattr("raycontrolnet.cluster.trainer.InterruptibleTrainer", trainer)
    with pytest.raises(RunError, match=f"collectives: {expected} s"):
        fit(TrainConfig(**tiny_settings | {"num_workers": "1", "hang_timeout_s": hang_timeout_s}))


@pytest.mark.slow
@pytest.mark.usefixtures("_local_ray")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_stopped_worker_is_started_again(tiny_settings: Settings, tmp_path: Path, num_workers: int) -> None:
    """A process that neither runs nor ends: of two, the other waits for it in a collective."""
    settings = tiny_settings | {"num_workers": str(num_workers), "cpus_per_worker": 1.0, "train_batch_size": 2}
    settings |= {"max_train_steps": 60, "checkpointing_steps": 10, "checkpoints_total_limit": 2, "hang_timeout_s": 8.0}
    whole = run(settings, tmp_path / "whole")

    def stop_one() -> None:
        os.kill(workers_called("RayTrainWorker")[-1].pid, signal.SIGSTOP)

    with when(lambda: last_step(tmp_path / "out") >= 15, stop_one) as stopped:
        out = run(settings, tmp_path / "out")
    assert stopped
    assert column(out, "loss") == column(whole, "loss")
    assert equal(weights(out), weights(whole))
    if num_workers == 2:
        assert "hung: nothing came of an update for 0:08" in (out / "run.log").read_text()
    with (
        when(lambda: last_step(tmp_path / "ended") >= 15, stop_one),
        pytest.raises(
            RunError,
            match=r"Worker [01] hung.*(no sign of life|not answered)"
            if num_workers == 2
            else "A worker has not answered within --hang_timeout_s=8",
        ),
    ):
        run(settings, tmp_path / "ended", max_failures=0)
