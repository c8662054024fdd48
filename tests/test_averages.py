"""Averages of the weights: EMAModel's, exact over a resume, and what is measured, drawn with and exported."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import fake_rows, save_state, steps, training
from runs import WEIGHTS, Settings, contents, equal, lines, losses, run, train, weights
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from raycontrolnet import TrainConfig
from raycontrolnet.model.averages import averaged, trained_weights
from raycontrolnet.sampling.find_controlnet import find
from raycontrolnet.training.host_copy import HostCopy
from raycontrolnet.training.schedule import Schedule
from raycontrolnet.training.state import accelerator_for, build_state, state_parts, write_parts

Weights = dict[str, Tensor]


@pytest.fixture
def settings(tiny_settings: Settings) -> Settings:
    """Return the settings of a run with averages, which differ from the weights by much."""
    return tiny_settings | {"use_ema": True, "learning_rate": 1e-2, "max_train_steps": 4, "checkpointing_steps": 2}


def worker(rank: int, folder: str, settings: Settings) -> None:
    """Set up what Ray Train does for a worker of two, and do three updates."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    config = TrainConfig(**settings)
    with accelerator_for(config, use_gpu=False, world_size=2) as accelerator:
        state = build_state(config, Schedule.of(config, 13, 2), accelerator, None, None)
        for update in range(3):
            with averaged(state.components.controlnet, state.averages):  # as for a measurement
                pass
            steps(state, fake_rows(2 * update + rank))
        assert state.averages
        torch.save((state.averages.shadow_params, parameters(state)), Path(folder, f"rank-{rank}.pt"))
    torch.distributed.destroy_process_group()


def test_two_workers_have_the_same_averages(settings: Settings, tmp_path: Path) -> None:
    """And nearly those of one worker with the whole batch."""
    spawn(worker, (str(tmp_path), settings | {"train_batch_size": 1}), nprocs=2)
    (first, trained), (second, _) = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert all(map(torch.equal, first, second))
    assert not all(map(torch.equal, first, trained))
    with training(settings | {"train_batch_size": 2}) as state:
        steps(state, *(fake_rows(2 * update, 2 * update + 1) for update in range(3)))
        assert state.averages
        for average, expected in zip(first, state.averages.shadow_params, strict=True):
            torch.testing.assert_close(average, expected, rtol=1e-3, atol=1e-4)


def test_a_copy_for_the_saver_has_them(settings: Settings, tmp_path: Path) -> None:
    """A checkpoint that is written beside the training is of its moment, while the averages go on."""
    with training(settings) as state:
        steps(state, fake_rows(0), fake_rows(1))
        save_state(state, tmp_path / "at once")
        copy = HostCopy().of(state_parts(state))
        steps(state, fake_rows(2))
        with averaged(state.components.controlnet, state.averages):
            write_parts(state.components.controlnet, copy, tmp_path / "later")
    one, other = contents(tmp_path / "at once"), contents(tmp_path / "later")
    assert one == other
    assert {"controlnet/" + WEIGHTS, "controlnet_raw/" + WEIGHTS} <= one.keys()


def test_generate_takes_the_averages_of_a_checkpoint(settings: Settings, tmp_path: Path) -> None:
    folder = run(settings, tmp_path / "run")
    found = find(str(folder / "checkpoint-2")).name_or_path
    assert equal(load_file(Path(found) / WEIGHTS), checkpoint(folder, 2))
    assert not equal(load_file(Path(found) / WEIGHTS), checkpoint(folder, 2, "controlnet_raw"))


def checkpoint(folder: Path, step: int, part: str = "controlnet") -> Weights:
    return load_file(folder / f"checkpoint-{step}" / part / WEIGHTS)


def parameters(state: Any) -> list[Tensor]:
    return [value.detach().clone() for value in trained_weights(state.components.controlnet).values()]


@pytest.mark.parametrize("decay", [0.9999, 0.3])
def test_the_averages_are_by_the_formula(settings: Settings, decay: float) -> None:
    """In float64: d(n) = min(decay, n / (n + 9)), and the first update's weights to begin with."""
    with training(settings | {"ema_decay": decay}) as state:
        assert state.averages
        expected: list[Tensor] = []
        for n in range(1, 6):
            steps(state, fake_rows(n))
            d = min(decay, n / (n + 9)) if n > 1 else 0.0
            now = [value.double() for value in parameters(state)]
            expected = [d * old + (1 - d) * new for old, new in zip(expected or now, now, strict=True)]
            for average, value in zip(state.averages.shadow_params, expected, strict=True):
                torch.testing.assert_close(average.double(), value, rtol=1e-6, atol=1e-7)
        assert not all(map(torch.equal, state.averages.shadow_params, parameters(state)))


def test_the_weights_train_as_without(settings: Settings, tmp_path: Path) -> None:
    """Bit for bit; the averages are what is exported, and what a checkpoint offers."""
    with_averages = run(settings, tmp_path / "with")
    without = run(settings, tmp_path / "without", use_ema=False)
    assert losses(with_averages) == losses(without)
    for step in (2, 4):
        assert equal(checkpoint(with_averages, step, "controlnet_raw"), checkpoint(without, step))
        assert not equal(checkpoint(with_averages, step), checkpoint(without, step))
        assert not (without / f"checkpoint-{step}" / "controlnet_raw").exists()
    assert equal(weights(with_averages), checkpoint(with_averages, 4))
    assert equal(weights(without), checkpoint(without, 4))


def test_exact_over_a_resume(settings: Settings, tmp_path: Path) -> None:
    straight = run(settings, tmp_path / "straight")
    stopped = run(settings, tmp_path / "stopped", max_train_steps=2)
    run(settings, stopped, resume_from_checkpoint="latest")
    assert losses(stopped) == losses(straight)
    for part in ("controlnet", "controlnet_raw"):
        assert equal(checkpoint(stopped, 4, part), checkpoint(straight, 4, part))
    assert equal(weights(stopped), weights(straight))


def test_a_checkpoint_without_averages(settings: Settings, tmp_path: Path) -> None:
    """They begin with its weights; and the weights train on as before."""
    folder = run(settings, tmp_path / "run", use_ema=False)
    straight = losses(folder)
    run(settings, folder, resume_from_checkpoint="checkpoint-2")
    assert "checkpoint-2 has no averages of the weights: they begin here" in (folder / "run.log").read_text()
    assert losses(folder) == straight
    assert not equal(checkpoint(folder, 4), checkpoint(folder, 4, "controlnet_raw"))
    state = torch.load(folder / "checkpoint-4" / "training_state.pt", weights_only=True)
    assert state["averaged_updates"] == 2


def test_without_averages_from_a_checkpoint_that_has_them(settings: Settings, tmp_path: Path) -> None:
    """The weights train on; the averages are left out, and that is said, as other changes of the training are."""
    straight = run(settings, tmp_path / "straight", use_ema=False)
    folder = run(settings, tmp_path / "run", max_train_steps=2)
    on = settings | {"output_dir": str(folder), "resume_from_checkpoint": "latest", "use_ema": False}
    shown = train(on | {"max_train_steps": 2, "loss": "huber", "learning_rate": 0.5}).shown
    changed = f"--loss=mse, --learning_rate={settings['learning_rate']}"
    assert f"checkpoint-2 was trained with {changed}; the run goes on with the settings given now\n" in shown
    shown = train(on).shown
    assert "checkpoint-2 was trained with" not in shown
    assert "the averages of checkpoint-2 are left out; --use_ema goes on with them\n" in shown
    assert losses(folder) == losses(straight)
    assert equal(weights(folder), weights(straight))


def test_what_is_measured(settings: Settings, tmp_path: Path) -> None:
    """A run that continues from the averages as its weights measures, at once, what the run with averages did."""
    measured = settings | {"validation_split": 4, "validation_steps": 2}
    with_averages = run(measured, tmp_path / "with")
    records = lines(with_averages / "validation.jsonl")
    assert [record["weights"] for record in records] == ["averages"] * 2
    assert "held-out loss of the averages" in (with_averages / "run.log").read_text()
    assert ", of the averages" in (with_averages / "report.html").read_text()
    assert "are averages over the updates" in (with_averages / "README.md").read_text()
    start = tmp_path / "averages"
    shutil.copytree(with_averages / "checkpoint-4" / "controlnet", start)
    frozen = {"learning_rate": 0, "max_train_steps": 1, "validation_steps": 1, "adam_weight_decay": 0}
    of_averages = measured | frozen | {"controlnet_model_name_or_path": str(start), "use_ema": False}
    again = run(of_averages, tmp_path / "again")
    (record,) = lines(again / "validation.jsonl")
    assert record["val_loss"] == records[-1]["val_loss"]
    assert "weights" not in record
    raw = run(
        of_averages,
        tmp_path / "raw",
        controlnet_model_name_or_path=str(start.parent / "with" / "checkpoint-4" / "controlnet_raw"),
    )
    assert lines(raw / "validation.jsonl")[0]["val_loss"] != record["val_loss"]


def test_images_are_drawn_with_the_averages(settings: Settings, circles: Path, tmp_path: Path) -> None:
    control = str(next((circles).rglob("*conditioning*/*.png"), None) or next(circles.rglob("*.png")))
    drawn = settings | {"validation_prompt": ("a circle",), "validation_image": (control,), "num_validation_images": 1}
    folder = run(drawn, tmp_path / "with", validation_steps=2)
    start = str(folder / "checkpoint-2" / "controlnet")
    frozen = {"learning_rate": 0, "max_train_steps": 1, "validation_steps": 1, "adam_weight_decay": 0, "use_ema": False}
    again = run(drawn | frozen, tmp_path / "again", controlnet_model_name_or_path=start)
    first, second = (
        {path.name: path.read_bytes() for path in (out / "validation" / step).glob("*.png")}
        for out, step in ((folder, "step-000002"), (again, "step-000001"))
    )
    assert first
    assert first == second


def test_the_weights_are_back_after_an_error(settings: Settings) -> None:
    with training(settings) as state:
        steps(state, fake_rows(0), fake_rows(1))
        assert state.averages
        before, averages = parameters(state), [value.clone() for value in state.averages.shadow_params]
        controlnet = state.components.controlnet
        inside = []

        def fail() -> None:
            with averaged(controlnet, state.averages):
                inside.extend(parameters(state))
                raise ValueError("here")

        with pytest.raises(ValueError, match="here"):
            fail()
        assert all(map(torch.equal, inside, averages))
        assert all(map(torch.equal, parameters(state), before))
        assert all(map(torch.equal, state.averages.shadow_params, averages))
