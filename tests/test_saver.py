"""Checkpoints that are written while the training goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from processes import START_TIMEOUT_S
from reference import fake_rows, save_state, steps, training
from runs import contents, flags

from raycontrolnet import TrainConfig, train_controlnet
from raycontrolnet.errors import Interrupted, RunError
from raycontrolnet.launch.fit import fit
from raycontrolnet.model.step import TrainState, train_step
from raycontrolnet.storage.checkpoint import all_checkpoints
from raycontrolnet.training import metrics, saver
from raycontrolnet.training.host_copy import HostCopy
from raycontrolnet.training.saver import CheckpointSaver
from raycontrolnet.training.state import StateParts, state_parts, write_parts

PATIENCE_S = 60.0
LONGER = {"max_train_steps": 8, "checkpointing_steps": 2, "train_batch_size": 1, "seed": 5}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run on the CPU write its checkpoints as one on a GPU does."""
    always = {"beside": True}
    monkeypatch.setattr(
        train_controlnet, "CheckpointSaver", lambda *args, **how: CheckpointSaver(*args, **how | always)
    )


@pytest.fixture
def settings(tiny_settings: dict[str, Any]) -> dict[str, Any]:
    return tiny_settings | LONGER


@pytest.fixture(scope="module")
def undisturbed(run_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same run, which wrote its checkpoints between the updates."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return fit(TrainConfig(**run_settings | LONGER | {"output_dir": str(folder)})).output_dir


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Hold the checkpoint of update 4 half written; give what lets it go on."""
    go_on = threading.Event()

    def write(controlnet: Any, parts: StateParts, folder: Path) -> None:
        write_parts(controlnet, parts, folder)
        if folder.name.startswith(".checkpoint-4."):
            assert go_on.wait(PATIENCE_S)

    monkeypatch.setattr(saver, "write_parts", write)
    yield go_on.set
    go_on.set()


def checkpoints_of(output_dir: Path) -> dict[str, dict[str, bytes]]:
    """Return checkpoint's name -> file's name -> bytes, without what differs between two runs."""
    return {
        each.path.name: {name: data for name, data in contents(each.path).items() if name != "manifest.json"}
        for each in all_checkpoints(output_dir)
    }


def until(happens: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not happens():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.mark.usefixtures("beside")
def test_the_files_are_those_of_a_run_that_waits(settings: dict[str, Any], undisturbed: Path) -> None:
    done = fit(TrainConfig(**settings)).output_dir
    assert list(checkpoints_of(done)) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert checkpoints_of(done) == checkpoints_of(undisturbed)
    assert (done / WEIGHTS).read_bytes() == (undisturbed / WEIGHTS).read_bytes()
    timings = [json.loads((folder / "run.json").read_text())["timings"] for folder in (done, undisturbed)]
    assert timings[0]["checkpoint_beside_s"] > 0
    assert "checkpoint_beside_s" not in timings[1]


@pytest.mark.usefixtures("beside")
def test_training_goes_on_until_the_next_is_due(
    settings: dict[str, Any], undisturbed: Path, held: Callable[[], None]
) -> None:
    """One is written at a time; what counts meanwhile is the one before; the end waits for the last."""
    folder = Path(settings["output_dir"])
    seen: list[list[int]] = []

    def watch() -> None:
        until(lambda: len(metrics.read(folder / metrics.METRICS_FILE)) >= 6)
        time.sleep(0.5)  # the next checkpoint, and the updates after it, would be there
        seen.append([each.step for each in all_checkpoints(folder)])
        seen.append([record["step"] for record in metrics.read(folder / metrics.METRICS_FILE)])
        held()

    watcher = threading.Thread(target=watch)
    watcher.start()
    fit(TrainConfig(**settings))
    watcher.join()
    assert seen == [[2], [1, 2, 3, 4, 5, 6]]
    assert checkpoints_of(folder) == checkpoints_of(undisturbed)


KILLED = textwrap.dedent("""
    import json, os, sys, time
    from pathlib import Path
    from raycontrolnet import TrainConfig, train_controlnet
    from raycontrolnet.launch.fit import fit
    from raycontrolnet.training import metrics, saver

    settings = json.loads(sys.argv[1])
    before = saver.write_parts

    def write(controlnet, parts, folder):
        before(controlnet, parts, folder)
        if folder.name.startswith(".checkpoint-4."):
            log = Path(settings["output_dir"]) / metrics.METRICS_FILE
            while len(metrics.read(log)) < 6:
                time.sleep(0.02)
            os._exit(9)

    saver.write_parts = write
    make = saver.CheckpointSaver
    train_controlnet.CheckpointSaver = lambda *args, **how: make(*args, **how | {"beside": True})
    fit(TrainConfig(**settings))
""")


@pytest.mark.usefixtures("beside")
def test_a_kill_meanwhile_costs_only_the_one_that_was_written(settings: dict[str, Any], undisturbed: Path) -> None:
    command = [sys.executable, "-c", KILLED, json.dumps(settings)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 9, ended.stderr
    folder = Path(settings["output_dir"])
    assert [each.step for each in all_checkpoints(folder)] == [2]
    fit(TrainConfig(**settings, resume_from_checkpoint="latest"))
    for name in ("checkpoint-4/controlnet", "checkpoint-8/controlnet", "."):
        assert (folder / name / WEIGHTS).read_bytes() == (undisturbed / name / WEIGHTS).read_bytes()
    assert [record["step"] for record in metrics.read(folder / metrics.METRICS_FILE)] == list(range(1, 9))


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("step", [4, 8])
def test_a_write_that_fails_ends_the_run(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    def write(controlnet: Any, parts: StateParts, folder: Path) -> None:
        write_parts(controlnet, parts, folder)
        if folder.name.startswith(f".checkpoint-{step}."):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(saver, "write_parts", write)
    with pytest.raises(RunError, match="Input/output error") as error:
        fit(TrainConfig(**settings))
    assert f"The checkpoint of update {step - 2} stands: go on with" in str(error.value)
    folder = Path(settings["output_dir"])
    assert [each.step for each in all_checkpoints(folder)] == list(range(2, step, 2))
    assert not (folder / WEIGHTS).exists()


@pytest.mark.usefixtures("beside")
def test_a_run_that_fails_leaves_the_one_that_was_written(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, held: Callable[[], None]
) -> None:
    def fails(state: TrainState, *rest: Any) -> Any:
        if state.step == 5:
            held()
            raise RuntimeError("the device is gone")
        return train_step(state, *rest)

    monkeypatch.setattr(train_controlnet, "train_step", fails)
    with pytest.raises(RunError, match="the device is gone"):
        fit(TrainConfig(**settings))
    assert [each.step for each in all_checkpoints(Path(settings["output_dir"]))] == [2, 4]


@pytest.mark.usefixtures("beside")
@pytest.mark.parametrize("in_an_update", [True, False])
def test_a_second_signal_gives_up_the_one_that_is_written(
    settings: dict[str, Any],
    undisturbed: Path,
    held: Callable[[], None],
    in_an_update: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes in an update, or while the run waits for the write, to begin the next."""
    folder = Path(settings["output_dir"])
    ended: list[float] = []

    def long_step(state: TrainState, *rest: Any) -> Any:
        if in_an_update and state.step == 4 and not ended:
            time.sleep(PATIENCE_S)
        return train_step(state, *rest)

    def interrupt_twice() -> None:
        until(lambda: len(metrics.read(folder / metrics.METRICS_FILE)) >= (4 if in_an_update else 6))
        until((folder / ".checkpoint-4.partial" / "training_state.pt").exists)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2)
        ended.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_controlnet, "train_step", long_step)
    watcher = threading.Thread(target=interrupt_twice)
    watcher.start()
    with pytest.raises(Interrupted, match="The checkpoint of update 2 stands: go on with") as error:
        fit(TrainConfig(**settings))
    assert error.value.exit_code == 130
    assert time.monotonic() - ended[0] < 15, "it waits for the write"
    watcher.join()
    held()
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "checkpoint"])
    assert [each.step for each in all_checkpoints(folder)] == [2], "nobody waits for it any more"
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    fit(TrainConfig(**settings, resume_from_checkpoint="latest"))
    for name in ("checkpoint-8/controlnet", "."):
        assert (folder / name / WEIGHTS).read_bytes() == (undisturbed / name / WEIGHTS).read_bytes()


STUCK = textwrap.dedent("""
    import sys, time
    from concurrent.futures import ThreadPoolExecutor
    from raycontrolnet import cli, train_controlnet

    loop = train_controlnet.train_controlnet

    def stuck_loop(loop_config):
        from raycontrolnet.training import saver

        before = saver.write_parts

        def write(controlnet, parts, folder):
            before(controlnet, parts, folder)
            if folder.name.startswith(".checkpoint-4."):
                (folder / "stuck").touch()
                ThreadPoolExecutor(1).submit(time.sleep, 60).result()  # such threads Python waits for

        saver.write_parts = write
        return loop(loop_config)

    train_controlnet.train_controlnet = stuck_loop
    sys.exit(cli.main())
""")


@pytest.mark.parametrize("num_workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_second_signal_ends_the_command_at_once(settings: dict[str, Any], num_workers: str) -> None:
    """In its own process, or with a worker on a Ray of its own."""
    settings["num_workers"], folder = num_workers, Path(settings["output_dir"])
    command = [sys.executable, "-c", STUCK, "train", *flags(settings)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            until((folder / ".checkpoint-4.partial" / "stuck").exists, START_TIMEOUT_S)
            process.send_signal(signal.SIGINT)
            time.sleep(1)
            assert process.poll() is None, "the first waits for it"
            process.send_signal(signal.SIGINT)
            start = time.monotonic()
            _, said = process.communicate(timeout=40)
            seconds = time.monotonic() - start
        finally:
            process.kill()
    assert process.returncode == 130, said
    assert seconds < 25
    assert said.splitlines()[-1].startswith("Interrupted. The checkpoint of update 2 stands: go on with")
    assert [each.step for each in all_checkpoints(folder)] == [2]


@pytest.mark.usefixtures("beside")
def test_a_host_without_room_writes_between_the_updates(
    settings: dict[str, Any], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    done = fit(TrainConfig(**settings)).output_dir
    log = (done / "run.log").read_text()
    assert log.count("checkpoints are written between updates, not beside them") == 1
    assert "of host memory, and 5 kB are available" in log
    assert checkpoints_of(done) == checkpoints_of(undisturbed)
    assert json.loads((done / "run.json").read_text())["timings"]["checkpoint_beside_s"] == 0


def test_a_copy_stays_as_it_was_taken(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """Also when its memory is used again: for the next copy, and no other."""
    copy = HostCopy()
    with training(tiny_settings) as state:
        steps(state, fake_rows(0, 1))
        size = copy.bytes_to_come(state_parts(state))
        assert size > 3 * sum(value.numel() * 4 for value in state.components.controlnet.parameters()) - 1
        first = copy.of(state_parts(state))
        save_state(state, tmp_path / "now")
        steps(state, fake_rows(2, 3))
        write_parts(state.components.controlnet, first, tmp_path / "copied")
        second = copy.of(state_parts(state))
        assert copy.bytes_to_come(state_parts(state)) == 0
        save_state(state, tmp_path / "later")
        write_parts(state.components.controlnet, second, tmp_path / "copied later")
    assert contents(tmp_path / "copied") == contents(tmp_path / "now") != contents(tmp_path / "later")
    assert contents(tmp_path / "copied later") == contents(tmp_path / "later")
    assert all(second.weights[name].data_ptr() == value.data_ptr() for name, value in first.weights.items())


def test_the_files_are_those_that_diffusers_writes(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    with training(tiny_settings) as state:
        controlnet: Any = state.components.controlnet
        controlnet.to(memory_format=torch.channels_last)
        save_state(state, tmp_path / "ours")
        controlnet.save_pretrained(tmp_path / "theirs")
    assert contents(tmp_path / "ours" / "controlnet") == contents(tmp_path / "theirs")


def test_a_host_that_gives_no_copy(
    settings: dict[str, Any], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(copy: HostCopy, parts: StateParts) -> StateParts:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(HostCopy, "of", no_room)
    monkeypatch.setattr(
        train_controlnet, "CheckpointSaver", lambda *args, **how: CheckpointSaver(*args, **how | {"beside": True})
    )
    done = fit(TrainConfig(**settings)).output_dir
    assert (done / "run.log").read_text().count("no copy can be made") == 1
    assert checkpoints_of(done) == checkpoints_of(undisturbed)
