"""The watchdog: a worker that hangs ends, with its stacks in the log, and is started again."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import last_step, when, workers_called
from runs import Settings, column, equal, run, weights

from raycontrolnet import TrainConfig, fit
from raycontrolnet.errors import RunError
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.text import first_of
from raycontrolnet.training.background import repeating
from raycontrolnet.training.failures import read_hang
from raycontrolnet.training.signs_of_life import Position, SignsOfLife
from raycontrolnet.training.watchdog import Watchdog
from raycontrolnet.training.whereabouts import whereabouts

UPDATE_5 = Position(5, "an update")

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
    watchdog.begin_update(1, 1)
    watchdog.micro_step_done()
    watchdog.started()
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


WRITING = """
import sys, time
from pathlib import Path
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training import saver
from raycontrolnet.training.background import begun
from raycontrolnet.training.watchdog import Watchdog

def write():
    time.sleep(9)
    (folder / "written").touch()

folder, phase = Path(sys.argv[1]), sys.argv[2]
begun(write, "checkpoint", saver._unfinished)
watchdog = Watchdog("Worker 0", RunFolder(str(folder)), folder / "run.log", 5.0)
with watchdog.watching():
    watchdog.begin_update(1, 1)
    watchdog.micro_step_done()
    watchdog.started()
    watchdog.progress(phase)
    time.sleep(60)
"""


@pytest.mark.parametrize(("phase", "is_waited_for"), [("an update", True), ("the last checkpoint", False)])
def test_a_checkpoint_that_is_written_is_waited_for(tmp_path: Path, phase: str, is_waited_for: bool) -> None:
    """Not where the writing may be what hangs."""
    done = subprocess.run([sys.executable, "-c", WRITING, str(tmp_path), phase], timeout=50, check=False)
    assert done.returncode == 1
    assert f"Worker 0 hung: nothing came of {phase} for 0:05" in str(read_hang(tmp_path))
    assert (tmp_path / "written").exists() == is_waited_for


def signs_of(number: int) -> list[SignsOfLife]:
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    return [SignsOfLife(rank, number, store) for rank in range(number)]


def test_a_worker_that_is_stopped_is_named_to_those_that_wait_for_it() -> None:
    signs = signs_of(3)
    assert signs[0].suspect(UPDATE_5, 0.2) is None, "it has not asked yet"
    signs[0].exchange(Position(1, "the start"))
    said = signs[0].suspect(Position(1, "the start"), -1)
    assert said == "worker 1 has given no sign of life for 0:00", "not one since"
    for each in (*signs, *signs, signs[0]):
        each.exchange(UPDATE_5)
    assert signs[0].suspect(UPDATE_5, 0.2) is None, "all are alike"
    time.sleep(0.3)
    for rank in (0, 1, 0):  # and not 2
        signs[rank].exchange(UPDATE_5)
    assert signs[0].suspect(UPDATE_5, 0.2) == "worker 2 has given no sign of life for 0:00"
    assert signs[0].suspect(UPDATE_5, 60) is None


def test_there_may_be_no_limit(tmp_path: Path) -> None:
    """A watch that fails in its thread fails the test."""
    with Watchdog("Worker 0", RunFolder(str(tmp_path)), tmp_path / "run.log", math.inf).watching():
        time.sleep(0.1)


def test_a_worker_that_is_behind_is_named() -> None:
    signs = signs_of(3)
    told = [(5, "an update"), (5, "the wait for data"), (4, "a checkpoint")]
    for each, (update, doing) in [*zip(signs, told, strict=True)] * 2:
        each.exchange(Position(update, doing))
    this = "this one is in update 5 at an update"
    assert signs[0].suspect(UPDATE_5, 60) == f"{this}, worker 2 in update 4 at a checkpoint"
    signs[2].exchange(UPDATE_5)
    signs[0].exchange(UPDATE_5)
    assert signs[0].suspect(UPDATE_5, 60) == f"{this}, worker 1 in update 5 at the wait for data"
    signs[1].exchange(Position(4, "the wait for data"))
    assert signs[1].suspect(Position(4, "the wait for data"), 60) is None, "it is behind itself"


def test_a_worker_with_more_micro_steps_to_go_is_named() -> None:
    """However many each has: an elastic run deals them out unequally."""
    signs = signs_of(2)
    for each in (*signs, *signs):
        each.exchange(UPDATE_5._replace(left=1 + each.rank))
    said = (
        "this one is in update 5 at an update with 1 micro-step to go, worker 1 in update 5 at an update with 2 micro-"
    )
    assert signs[0].suspect(UPDATE_5._replace(left=1), 60) == f"{said}steps to go"
    assert signs[1].suspect(UPDATE_5._replace(left=2), 60) is None


def test_workers_that_are_alike_are_told_apart_by_their_place_in_the_code() -> None:
    signs = signs_of(6)
    wheres = [UPDATE_5._replace(where=where) for where in ("in A", "in B", "in A", "in A", "in A", "in A")]
    for each, position in [*zip(signs, wheres, strict=True)] * 2:
        each.exchange(position)
    all_are = "all workers are in update 5 at an update"
    some = "this one, worker 2, worker 3 and 2 more in A"
    assert signs[0].suspect(wheres[0], 60) == f"{all_are}: worker 1 in B; {some}"
    assert signs[1].suspect(wheres[0], 60) == f"{all_are}, in A"
    assert signs[0].suspect(UPDATE_5, 60) is None, "it does not know"
    signs[0].is_over = True
    ended = "worker 0, which keeps all signs of life, has ended"
    assert signs[0].suspect(wheres[0], 60) == f"{ended}; before that, {all_are}: worker 1 in B; {some}"
    assert signs[0].suspect(UPDATE_5, 60) == ended


def test_whereabouts_of_a_thread() -> None:
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            over.wait()
            return gradient

    def backward() -> None:
        Backward.apply(torch.ones(1, requires_grad=True)).backward()

    def here() -> None:
        with repeating(over.wait, 0.0, "a thread that does not end"):
            pass

    class Words(list[str]):
        def __len__(self) -> int:
            over.wait()
            return 0

    over = threading.Event()
    counts = threading.Thread(target=first_of, args=(Words(),), name="words")
    threads = [counts, *(threading.Thread(target=work) for work in (here, backward, over.wait, counts.join))]
    for thread in threads:
        thread.start()
    try:
        time.sleep(1)
        itself, first, second, third, other = [whereabouts(thread.ident or 0) for thread in threads]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert first == 'waiting for the thread "a thread that does not end"'
    assert second == "in the backward pass, in which gradients are exchanged"
    assert third == "", "nothing of ours"
    assert itself == "in first_of of text.py"
    assert other == f'waiting for the thread "words", which is {itself}'
    assert whereabouts(0) == "", "no such thread"


STOPPED = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training.background import repeating
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
    watchdog.begin_update(6, 1)
    watchdog.micro_step_done()
    watchdog.started()
    time.sleep(2)
    watchdog.begin_update(7, 1)
    if rank == stopped:
        os.kill(os.getpid(), signal.SIGSTOP)
    if stopped < 0 and rank == 0:
        dist.all_reduce(torch.zeros(1))
    with repeating(lambda: time.sleep(60), 0.0, "a thread that does not end"):
        pass
"""


def test_an_update_that_begins_ends_what_came_before(tmp_path: Path) -> None:
    """A checkpoint that may take as long as its store does not stop the watch over the update that follows."""
    watchdog = Watchdog("Worker 0", RunFolder(str(tmp_path)), tmp_path / "run.log", 4.0)
    watchdog.begin_update(1, 1)
    assert watchdog.clock.limit_s == math.inf, "the first batch may take long"
    watchdog.micro_step_done()
    watchdog.started()
    watchdog.progress("a checkpoint", timed=False)
    assert watchdog.clock.limit_s == math.inf
    watchdog.begin_update(2, 1)
    assert (watchdog.clock.phase, watchdog.clock.limit_s) == ("an update", 4.0)


def test_the_start_may_take_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled; reading the models and the first batch may take as long as they do."""
    ended: list[str] = []
    monkeypatch.setattr("raycontrolnet.training.watchdog.START_TIMES", 5)
    monkeypatch.setattr("raycontrolnet.training.watchdog.LEAST_START_S", 0.0)
    watchdog = Watchdog("Worker 0", RunFolder(str(tmp_path)), tmp_path / "run.log", 1.0)
    monkeypatch.setattr(watchdog, "_end", lambda clock: ended.append(f"{clock.phase} {clock.limit_s}"))

    def ended_after(seconds: float) -> str:
        watchdog.clock = watchdog.clock._replace(since=watchdog.clock.since - seconds)
        watchdog._looked = time.monotonic()
        watchdog._look()
        return ended.pop() if ended else ""

    with watchdog.watching():
        assert not ended_after(1e9)
        watchdog.models_read()
        assert not ended_after(4)
        assert ended_after(1) == "the first collective 5.0"
        watchdog.state_built()
        assert ended_after(5) == "the preparations 5.0"
        watchdog.progress("", timed=False)
        watchdog.begin_update(1, 2)
        with watchdog.waiting_for_data():
            assert not ended_after(1e9)
        assert not ended_after(4)
        assert ended_after(1) == "an update 5.0"
        watchdog.micro_step_done()
        assert not ended_after(4)
        watchdog.micro_step_done()
        assert not ended_after(4), "others may still be at it"
        watchdog.started()
        assert ended_after(1) == "an update 1.0", "the first update is done"
        watchdog.begin_update(2, 2)
        with watchdog.waiting_for_data():
            assert ended_after(1) == "an update 1.0"
        with watchdog.watched_last():
            assert ended_after(1) == "an update 1.0"
        assert not ended_after(1e9)


def test_a_worker_says_what_it_does_at_the_start(
    tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models are read, the workers meet in `state_of`, the rest is prepared, the first batch is awaited."""
    seen: list[str] = []

    def note(module: str, name: str) -> None:
        function = vars(import_module(f"raycontrolnet.{module}"))[name]

        def noted(*given: Any, **named: Any) -> Any:
            seen.append(name)
            return function(*given, **named)

        monkeypatch.setattr(f"raycontrolnet.{module}.{name}", noted)

    def progress(watchdog: Watchdog, phase: str, *, timed: bool = True) -> None:
        seen.append(f"{phase}, {'timed' if timed else 'untimed'}")

    monkeypatch.setattr(Watchdog, "progress", progress)
    for module, name in [
        ("training.state", "load_components"),
        ("training.state", "state_of"),
        ("train_controlnet", "open_trackers"),
        ("train_controlnet", "train_step"),
    ]:
        note(module, name)
    run(tiny_settings | {"num_workers": "0", "max_train_steps": 1}, tmp_path / "out")
    until_built = ["load_components", "the first collective, timed", "state_of", "the preparations, timed"]
    assert seen[:8] == [*until_built, "open_trackers", ", untimed", "an update, timed", "train_step"]


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


def test_a_hang_in_the_same_update_says_who_waits_in_a_collective(tmp_path: Path) -> None:
    workers = [subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path), str(rank), "-1"]) for rank in (0, 1)]
    try:
        assert [worker.wait(100) for worker in workers] == [1, 1]
    finally:
        for worker in workers:
            worker.kill()
    said = str(read_hang(tmp_path))
    assert "all workers are in update 7 at an update with 1 micro-step to go: " in said
    who = ("this one", "worker 1") if said.startswith("Worker 0") else ("worker 0", "this one")
    assert f"{who[0]} waiting in a collective (all_reduce)" in said
    assert f'{who[1]} waiting for the thread "' in said


def test_one_that_does_not_is_left_alone(tmp_path: Path) -> None:
    """Nor one that waits for its first batch, as for nodes that load data."""
    watchdog = Watchdog("Worker 0", RunFolder(str(tmp_path)), tmp_path / "run.log", 0.4)
    with watchdog.watching():
        time.sleep(0.8)
        watchdog.begin_update(1, 1)
        for _ in range(8):
            watchdog.micro_step_done()
            watchdog.started()
            time.sleep(0.1)
    time.sleep(0.8)
    assert not (tmp_path / "run.log").exists()


@pytest.mark.usefixtures("_local_ray")
@pytest.mark.parametrize(
    ("hang_timeout_s", "expected"), [(100.0, 1800), (600.0, 2400), (3600.0, 14400), (math.inf, 10**8)]
)
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


@pytest.mark.slow
@pytest.mark.usefixtures("_local_ray")
def test_a_hang_in_the_step_says_where_each_worker_is(
    tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One waits for the other's gradients; neither is behind."""

    def loop(loop_config: Any) -> Any:
        from raycontrolnet import train_controlnet
        from raycontrolnet.cluster.worker import place_among_workers
        from raycontrolnet.model import step

        (rank, _), predict = place_among_workers(), vars(step)["_loss"]
        calls: list[int] = []

        def stuck(*given: Any) -> Any:
            calls.append(1)
            if rank == 1 and len(calls) == 4:
                repeating_for_ever()
            return predict(*given)

        def repeating_for_ever() -> None:
            with repeating(lambda: time.sleep(60), 0.0, "a thread that does not end"):
                pass

        vars(step)["_loss"] = stuck
        return train_controlnet.train_controlnet(loop_config)

    monkeypatch.setattr("raycontrolnet.train_controlnet.train_controlnet", loop)
    settings = tiny_settings | {"num_workers": "2", "cpus_per_worker": 1.0, "hang_timeout_s": 10.0, "max_failures": 0}
    with pytest.raises(RunError) as error:
        run(settings, tmp_path / "out")
    said = str(error.value)
    assert "all workers are in update 4 at an update with 1 micro-step to go: " in said
    assert 'waiting for the thread "a thread that does not end"' in said
    assert "in the backward pass, in which gradients are exchanged" in said


@pytest.mark.slow
@pytest.mark.usefixtures("_local_ray")
@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        (
            "training.state",
            "load_components",
            "update is done): this one is in update 0 at the first collective, worker 1 in update 0 at the reading of",
        ),
        (
            "model.step",
            "_loss",
            "all workers are in update 1 at an update with 1 micro-step to go: ",
        ),
    ],
)
def test_a_hang_at_the_start_says_where_each_worker_is(
    tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, said: str
) -> None:
    """Worker 1 hangs before the first collective, or in its first micro-step."""

    def loop(loop_config: Any) -> Any:
        from raycontrolnet import train_controlnet
        from raycontrolnet.cluster.worker import place_among_workers
        from raycontrolnet.training import watchdog

        vars(watchdog).update(START_TIMES=1.5, LEAST_START_S=0.0)
        if place_among_workers()[0] == 1:
            vars(import_module(f"raycontrolnet.{module}"))[name] = lambda *_, **__: time.sleep(600)
        return train_controlnet.train_controlnet(loop_config)

    monkeypatch.setattr("raycontrolnet.train_controlnet.train_controlnet", loop)
    settings = tiny_settings | {"num_workers": "2", "cpus_per_worker": 1.0, "hang_timeout_s": 8.0, "max_failures": 0}
    with pytest.raises(RunError) as error:
        run(settings, tmp_path / "out")
    assert said in str(error.value)
    assert "for 0:12 (--hang_timeout_s=8; longer until the first update is done)" in str(error.value)
    assert "most recent call first" in (tmp_path / "out" / "run.log").read_text()
