"""Runs on Ray: the same weights whatever the number of workers, restarts and places where they happen."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
import torch
from processes import (
    START_TIMEOUT_S,
    ctrl_c,
    kill_a_train_worker,
    kill_the_controller,
    last_step,
    processes_of_session,
    start_ray,
    wait_for,
    when,
)
from reference import write_trained_controlnet
from runs import Settings, column, run, weights

from raycontrolnet import TrainConfig, fit
from raycontrolnet.config.train_config import changed_settings
from raycontrolnet.demo.shapes import write_shapes
from raycontrolnet.errors import ConfigError, RunError, UserError
from raycontrolnet.launch import waiting
from raycontrolnet.training import held_out

pytestmark = pytest.mark.usefixtures("_local_ray")


@pytest.fixture
def settings(tiny_settings: Settings) -> Settings:
    return tiny_settings | {"num_workers": "1", "cpus_per_worker": 1.0}


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit."""
    assert column(one, "step") == column(other, "step")
    assert column(one, "loss") == column(other, "loss")
    assert column(one, "grad_norm") == column(other, "grad_norm")
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert len(first) > 50
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_two_workers_learn_what_one_does(settings: Settings, tmp_path: Path) -> None:
    """1 worker x batch 4 and 2 workers x 2 batches of 1: the same losses over 10 updates, across the ends of epochs.

    And the learning rate, which a schedule changes, counts updates, neither workers nor batches.
    """
    changes: Settings = {"max_train_steps": 10, "checkpointing_steps": 100, "proportion_empty_prompts": 0.3}
    changes |= {"validation_split": 5, "validation_steps": 5, "lr_scheduler": "cosine", "lr_warmup_steps": 2}
    base = Path(settings["pretrained_model_name_or_path"])
    changes |= {"controlnet_model_name_or_path": str(write_trained_controlnet(base, tmp_path / "controlnet"))}
    one = run(settings, tmp_path / "one", **changes, num_workers="0")
    changes |= {"num_workers": "2", "train_batch_size": 1, "gradient_accumulation_steps": 2}
    two = run(settings, tmp_path / "two", **changes)
    status = json.loads((two / "run.json").read_text())
    assert status["started"] + status["seconds"] - column(two, "time")[-1] < 10, "Ray Train waits for something"
    assert column(one, "samples") == column(two, "samples") == [4 * update for update in range(1, 11)]
    assert column(two, "loss") == pytest.approx(column(one, "loss"), rel=0, abs=1e-5)
    assert len(set(column(one, "loss"))) == 10
    assert column(two, "lr") == pytest.approx(cosine_curve(settings["learning_rate"], 2, 10), rel=1e-12)
    for name in ("val_loss", "val_loss_shuffled", "control_gap"):
        measured = [[line[name] for line in held_out.read(folder)] for folder in (one, two)]
        assert len(measured[0]) == 2
        assert min(abs(value) for value in measured[0]) > 5e-6, "the control images matter to this one"
        assert measured[1] == pytest.approx(measured[0], rel=0, abs=2e-6)


@pytest.mark.slow
def test_resume_on_ray_is_exact(settings: Settings, tmp_path: Path) -> None:
    """Stopped off Ray after 2 of 4 updates, in the middle of an epoch, and continued on it: the run in one piece.

    The other way round is that of a run with a corrupt image.
    """
    changes = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    here = settings | {"num_workers": "0"}
    whole = run(here, tmp_path / "whole", **changes)
    parts = run(here, tmp_path / "parts", **changes, max_train_steps=2)
    run(settings, parts, **changes, resume_from_checkpoint="latest")
    assert_same_run(whole, parts)


@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(kill_a_train_worker, id="worker"),
        pytest.param(kill_the_controller, id="controller", marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_costs_nothing(kill: Callable[[], None], settings: Settings, tmp_path: Path) -> None:
    """Kill -9 of the worker, or of Train's controller, between checkpoints: the averages of an undisturbed run."""
    changes = {"max_train_steps": 30, "checkpointing_steps": 10, "use_ema": True}
    undisturbed = run(settings | {"num_workers": "0"}, tmp_path / "undisturbed", **changes)
    disturbed = tmp_path / "disturbed"
    with when(lambda: last_step(disturbed) >= 12, kill) as killed:
        run(settings, disturbed, **changes)
    assert killed == [True], "nothing was killed"
    assert_same_run(undisturbed, disturbed)


@pytest.mark.slow
def test_without_allowed_failures_a_killed_worker_ends_the_run(settings: Settings, tmp_path: Path) -> None:
    changes = {"max_train_steps": 30, "checkpointing_steps": 10, "max_failures": 0}
    message = "The checkpoint of update (10|20) stands: go on with --resume_from_checkpoint latest"
    with (
        when(lambda: last_step(tmp_path / "out") >= 12, kill_a_train_worker) as killed,
        pytest.raises(RunError, match=message),
    ):
        run(settings, tmp_path / "out", **changes)
    assert killed == [True], "no worker was killed"


@pytest.mark.parametrize("numbers", [(2, 1), pytest.param((3, 2, 1), marks=pytest.mark.slow)], ids=str)
def test_an_elastic_run_keeps_the_curve(numbers: tuple[int, ...], settings: Settings, tmp_path: Path) -> None:
    """Two updates on each number of 3 workers: they are those of 3, within epochs and across.

    At first no CPU is left for loading. Two workers do three micro-batches of an update, and one of them has two.
    """
    base = Path(settings["pretrained_model_name_or_path"])
    last = 2 * len(numbers)
    settings |= {"controlnet_model_name_or_path": str(write_trained_controlnet(base, tmp_path / "controlnet"))}
    settings |= {"train_batch_size": 2, "scale_lr": True, "learning_rate": 1e-4, "max_train_steps": last}
    settings |= {"use_ema": True}
    whole = run(settings, tmp_path / "whole", num_workers="0", gradient_accumulation_steps=3)
    settings |= {"num_workers": "1:3", "dataloader_num_workers": 1}
    ray.shutdown()  # it keeps a CPU for the loading of an earlier test's killed run, for three minutes
    start_ray()
    for done, number in zip(range(0, last, 2), numbers, strict=True):
        out = run(
            settings, tmp_path / "out", max_train_steps=done + 2, cpus_per_worker={3: 1.0, 2: 1.5, 1: 2.0}[number],
            resume_from_checkpoint="latest" if done else None,
        )  # fmt: skip
    assert re.findall(r"update (\d) on: (\d) worker", (out / "run.log").read_text()) == [
        (str(done), str(number)) for done, number in zip(range(0, last, 2), numbers, strict=True)
    ]
    status = json.loads((out / "run.json").read_text())
    assert (status["num_workers"], status["processes"]) == ("1:3", numbers[-1])
    assert column(out, "samples") == column(whole, "samples") == [6 * update for update in range(1, last + 1)]
    assert column(out, "lr") == column(whole, "lr")
    for name in ("loss", "grad_norm"):
        assert column(out, name) == pytest.approx(column(whole, name), rel=0, abs=1e-5)
    assert len(set(column(out, "loss"))) == last
    averages = weights(whole)
    for name, value in weights(out).items():
        torch.testing.assert_close(value, averages[name], rtol=1e-3, atol=1e-5)


def test_a_corrupt_image_ends_the_run_with_its_name(settings: Settings, tmp_path: Path) -> None:
    """One try, not one for every allowed failure; the updates before it are kept, and the mended data continue."""
    data = write_shapes(tmp_path / "data", 13, resolution=settings["resolution"])
    here = settings | {"num_workers": "0"}
    whole = run(here, tmp_path / "whole", train_data_dir=str(data), max_train_steps=3, checkpointing_steps=100)
    victim = first_image_of_update(3, data, settings)
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    changes = {"train_data_dir": str(data), "max_train_steps": 3, "checkpointing_steps": 100}
    with pytest.raises(UserError, match=rf"{victim.name}") as failure:
        run(settings, tmp_path / "out", **changes)
    assert "The checkpoint of update 2 stands: go on with --resume_from_checkpoint latest" in str(failure.value)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"
    victim.write_bytes(content)
    run(here, tmp_path / "out", **changes, resume_from_checkpoint="latest")
    assert_same_run(whole, tmp_path / "out")


def test_a_model_that_cannot_be_trained_is_refused_once(settings: Settings, tmp_path: Path) -> None:
    base = tmp_path / "base"
    subprocess.run(["cp", "-r", settings["pretrained_model_name_or_path"], str(base)], check=True)
    scheduler = base / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(UserError, match="its scheduler's prediction_type is 'sample'; only epsilon and v_prediction"):
        run(settings, tmp_path / "out", pretrained_model_name_or_path=str(base))


def test_a_run_whose_workers_never_come(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another holds the CPUs: the run says what it waits for, and gives up when it was told to."""
    monkeypatch.setattr(waiting, "FIRST_NEWS_S", 2.0)
    held = ray.util.placement_group([{"CPU": 3}])
    assert held.wait(30)
    stream = io.StringIO()
    try:
        with pytest.raises(RunError) as error:
            fit(TrainConfig(**settings | {"output_dir": str(tmp_path / "out"), "wait_timeout_s": 5}), stream=stream)
    finally:
        ray.util.remove_placement_group(held)
    state = "1 node up with 0 CPUs free; the run needs 1 worker of 1 CPU"
    assert f": {state}\n" in stream.getvalue()
    assert str(error.value).startswith(
        f"The workers have not started within --wait_timeout_s=5: {state}. Lower --num_workers, or wait longer"
    )
    wait_for(lambda: ray.available_resources().get("CPU") == 3, timeout_s=30)
    run(settings, tmp_path / "out", num_workers="0")


def test_workers_that_leave_no_cpu_for_loading_are_refused(settings: Settings, tmp_path: Path) -> None:
    """Ray would wait forever, without a word."""
    with pytest.raises(ConfigError, match=r"--num_workers=3, --cpus_per_worker=1: 3 x 1 CPUs and 1 for loading data"):
        run(settings, tmp_path / "out", num_workers="3")
    with pytest.raises(ConfigError, match="--use_gpu=True: the cluster has no GPU"):
        run(settings, tmp_path / "out", use_gpu=True)
    with pytest.raises(ConfigError, match="--mixed_precision=fp16: needs a GPU; use bf16 or no on the CPU"):
        run(settings, tmp_path / "out", mixed_precision="fp16")


@pytest.mark.parametrize(
    ("number", "group"),
    [
        pytest.param(signal.SIGTERM, False, id="SIGTERM to the driver"),
        pytest.param(signal.SIGINT, True, id="Ctrl-C to the terminal's processes", marks=pytest.mark.slow),
    ],
)
def test_signals_end_a_run_cleanly(settings: Settings, tmp_path: Path, number: int, group: bool) -> None:
    """A Ray of its own: a checkpoint of the current update, the message says how to go on, no process stays."""
    output_dir = tmp_path / "out"
    flags = changed_settings(
        TrainConfig(
            **settings
            | {
                "output_dir": str(output_dir),
                "max_train_steps": 100_000,
                "checkpoints_total_limit": 100,
                "cpus_per_worker": None,
            }
        )
    )
    command = [sys.executable, "-m", "raycontrolnet", "train"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    process, stderr = ctrl_c(command, (output_dir / "checkpoint-4").exists, whole_group=group, number=number)
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr
    step = max(int(path.name.partition("-")[2]) for path in output_dir.glob("checkpoint-*"))
    assert step == last_step(output_dir)
    assert "ending with a checkpoint of the current update; Ctrl-C again to end at once" in stderr
    expected = f"Interrupted. The checkpoint of update {step} stands: go on with --resume_from_checkpoint latest"
    assert expected in stderr.splitlines()[-1]
    assert json.loads((output_dir / "run.json").read_text())["status"] == "interrupted"
    wait_for(lambda: not processes_of_session(process.pid), timeout_s=20)


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_run(settings: Settings, tmp_path: Path) -> None:
    """As Slurm sends it, unless told otherwise: Ray ends first. The run says how to go on, before it is killed."""
    out = tmp_path / "out"
    changed = {
        "output_dir": str(out),
        "max_train_steps": 100_000,
        "checkpoints_total_limit": 2,
        "cpus_per_worker": None,
    }
    values = changed_settings(TrainConfig(**settings | changed | {"checkpointing_steps": 5}))
    command = [sys.executable, "-m", "raycontrolnet", "train"]
    command += [f"--{name}={value}" for name, value in values.items()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for((out / "checkpoint-5").exists, START_TIMEOUT_S)
        for each in processes_of_session(process.pid):
            with suppress(psutil.NoSuchProcess):
                each.terminate()
        stderr = process.communicate(timeout=28)[1]  # Slurm kills after 30
    finally:
        process.kill()
    assert process.returncode == 143, stderr
    assert "Interrupted. The checkpoint of update" in stderr.strip().splitlines()[-1]
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    wait_for(lambda: not processes_of_session(process.pid), timeout_s=20)


# Helpers


def cosine_curve(learning_rate: float, warmup: int, updates: int) -> list[float]:
    """Return the learning rate of each update, by diffusers."""
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=learning_rate)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=updates)
    expected = []
    for _ in range(updates):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return expected


def first_image_of_update(update: int, data: Path, settings: Settings) -> Path:
    from raycontrolnet.data.order import SampleOrder
    from raycontrolnet.data.sources import open_source

    config = TrainConfig(**settings | {"train_data_dir": str(data)})
    source = open_source(config)
    order = SampleOrder(len(source), settings["seed"])
    first_sample = (update - 1) * config.train_batch_size
    assert order.row(first_sample) not in {order.row(index) for index in range(first_sample)}
    image = source.read(order.row(first_sample)).image
    assert isinstance(image, str)
    return Path(image)
