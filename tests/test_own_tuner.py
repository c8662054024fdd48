"""`raycontrolnet.tune.trainable` in a `ray.tune.Tuner` of one's own."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining
from sweep_trials import losses

from raycontrolnet import TrainConfig, fit
from raycontrolnet.demo.shapes import write_shapes
from raycontrolnet.errors import ConfigError, UserError
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.tune import checkpoint_folder, trainable
from raycontrolnet.tune.trial_function import TuneCallback, _start

ROOT = Path(__file__).parent.parent


@pytest.fixture
def train(tiny_settings: dict[str, Any], tmp_path: Path) -> TrainConfig:
    """Return the settings of a trial of 4 updates, with a measurement and a checkpoint every 2."""
    rows = write_shapes(tmp_path / "rows", 16, resolution=32)
    own = {"train_data_dir": str(rows), "validation_steps": 2, "validation_split": 4, "num_workers": "1"}
    return TrainConfig(**tiny_settings | own | {"output_dir": str(tmp_path / "trials")})


def run(train: TrainConfig, space: dict[str, Any], folder: Path | str, **options: Any) -> tune.ResultGrid:
    """Run a Tuner with `train` and `space`; `folder` is a path or URI."""
    config = tune.TuneConfig(metric="val_loss", mode="min", **options)
    storage = tune.RunConfig(storage_path=f"{folder}/tune", verbose=0)
    return tune.Tuner(trainable(train), param_space=space, tune_config=config, run_config=storage).fit()


def donor_and_other(train: TrainConfig, folder: Path) -> tuple[tune.Result, tune.Result]:
    """Run two trials, of which the worse goes on from the better one's checkpoint at another learning rate."""
    better, worse = 2e-3, 1e-9
    scheduler = PopulationBasedTraining(
        time_attr="step",
        perturbation_interval=3,
        hyperparam_mutations={"learning_rate": [4e-3]},
        quantile_fraction=0.5,
        resample_probability=1.0,
        synch=True,
    )
    space = {"learning_rate": tune.grid_search([better, worse])}
    results = run(train, space, folder, scheduler=scheduler, reuse_actors=True)
    donor, other = sorted(results, key=lambda result: result.config["learning_rate"])
    assert (donor.config["learning_rate"], other.config["learning_rate"]) == (better, 4e-3)
    return donor, other


def folder_of(result: tune.Result) -> Path:
    """Return the folder of a trial's run."""
    return checkpoint_folder(result.checkpoint).parent


@pytest.mark.usefixtures("_local_ray")
def test_a_trial_is_a_run_of_fit(train: TrainConfig, tmp_path: Path) -> None:
    """It learns the same, bit for bit; Tune's result leads to the weights; bad settings fail it with our message."""
    results = run(train, {"learning_rate": tune.grid_search([2e-3, -1.0])}, tmp_path)
    good, bad = sorted(results, key=lambda result: -result.config["learning_rate"])
    assert good.metrics["step"] == 4
    assert good.metrics["training_iteration"] == 2
    assert {"val_loss", "control_gap", "loss", "images_per_second"} <= good.metrics.keys()
    assert results.get_best_result().config == good.config
    plain = replace(train, learning_rate=2e-3, num_workers="0", output_dir=str(tmp_path / "plain"))
    fit(plain, stream=io.StringIO())
    assert losses(folder_of(good)) == losses(tmp_path / "plain")
    weights = "controlnet/diffusion_pytorch_model.safetensors"
    expected = (tmp_path / "plain" / "checkpoint-4" / weights).read_bytes()
    assert (checkpoint_folder(good.checkpoint) / weights).read_bytes() == expected
    assert "--learning_rate=-1.0: must be" in str(bad.error)
    assert bad.checkpoint is None


@pytest.mark.slow
@pytest.mark.usefixtures("_local_ray")
def test_a_trial_of_two_workers(train: TrainConfig, tmp_path: Path) -> None:
    """Ray Train runs inside of Tune, and the latents are encoded there."""
    train = replace(train, num_workers="2", cpus_per_worker=0.5, train_batch_size=2)
    train = replace(train, cache_latents="on", latents_cache_dir=str(tmp_path / "latents"))
    (result,) = run(train, {"learning_rate": tune.choice([2e-3])}, tmp_path)
    assert result.error is None
    assert result.metrics["step"] == 4
    assert checkpoint_folder(result.checkpoint).name == "checkpoint-4"
    fit(replace(train, learning_rate=2e-3, output_dir=str(tmp_path / "plain")), stream=io.StringIO())
    assert losses(folder_of(result)) == losses(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.usefixtures("_local_ray")
def test_population_based_training(train: TrainConfig, tmp_path: Path) -> None:
    """The worse trial continues from the checkpoint of the better one, with settings of its own."""
    train = replace(train, max_train_steps=6)
    donor, other = donor_and_other(train, tmp_path)
    start = str(folder_of(donor) / "checkpoint-4")
    plain = replace(train, learning_rate=4e-3, num_workers="0", output_dir=str(tmp_path / "plain"))
    fit(replace(plain, resume_from_checkpoint=start), stream=io.StringIO())
    assert losses(folder_of(other))[4:] == losses(tmp_path / "plain")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hub_token": "hf_secret"}, "--hub_token: Tune would write it to its files; set HF_TOKEN where Ray runs"),
        ({"push_to_hub": True}, "--push_to_hub: trials would overwrite each other; push the best by hand"),
    ],
)
def test_settings_that_are_not_for_trials(tiny_settings: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        trainable(TrainConfig(**tiny_settings | changes))
    assert error.value.problems == (words,)


@pytest.mark.usefixtures("_local_ray")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lerning_rate", "param_space: unknown setting lerning_rate; perhaps you meant learning_rate"),
        ("output_dir", "param_space: output_dir: every trial has a folder of its own in that of the TrainConfig"),
    ],
)
def test_a_space_that_is_none(train: TrainConfig, tmp_path: Path, name: str, words: str) -> None:
    (result,) = run(train, {name: tune.choice(["x"])}, tmp_path)
    assert words in str(result.error)


def test_a_checkpoint_of_another_trainable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no raycontrolnet\.json, so no trial of raycontrolnet wrote it"):
        checkpoint_folder(tune.Checkpoint.from_directory(tmp_path))


def written(folder: Path, step: int, run_id: str) -> checkpoints.Checkpoint:
    """Write a checkpoint without weights."""
    return checkpoints.write(
        folder, step=step, samples=step, seed=0, run_id=run_id, save=lambda to: (to / "x").touch(), facts={}
    )


def test_the_checkpoint_that_a_report_names(tmp_path: Path) -> None:
    """It is the run's own, or the one it started from: not one that population based training has left behind."""
    own, donor = tmp_path / "own", tmp_path / "donor"
    own.mkdir()
    donor.mkdir()
    abandoned, start = written(own, 2, "before"), written(donor, 4, "donor")
    assert TuneCallback(RunFolder(str(own)), 2)._checkpoint(4) == abandoned  # continues from it
    callback = TuneCallback(RunFolder(str(own)), 2, start)
    assert callback._checkpoint(5) == start
    new = written(own, 6, "now")
    assert callback._checkpoint(5) == start
    assert callback._checkpoint(6) == new
    assert TuneCallback(RunFolder(str(tmp_path / "empty")), 2)._checkpoint(6) is None


def test_a_restored_checkpoint_that_is_gone(tmp_path: Path) -> None:
    """The trial continues from its own last one; without another's it cannot."""
    own, gone = tmp_path / "own", tmp_path / "donor" / "checkpoint-4"
    own.mkdir()
    folder, pruned = RunFolder(str(own)), str(own / "checkpoint-2")
    assert _start(folder, None) is None
    assert _start(folder, pruned) is None
    kept = written(own, 6, "before")
    assert _start(folder, pruned) == "latest"
    assert _start(folder, str(kept.path)) == str(kept.path)
    with pytest.raises(UserError, match="of another trial, and it is gone; keep more with a higher --checkpoints_"):
        _start(folder, str(gone))


@pytest.mark.slow
def test_the_example(tmp_path: Path) -> None:
    """It ends with the weights of the best trial."""
    from diffusers import ControlNetModel

    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    command = [sys.executable, "examples/own_tuner.py", "--max_train_steps", "4", "--num_samples", "2"]
    environment = os.environ | {"RAY_ADDRESS": "local"}  # not a head that somebody has left on this machine
    result = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, env=environment)
    *trials, last = result.stdout.splitlines()[-3:]
    assert all(" updates" in line for line in trials)
    ControlNetModel.from_pretrained(last.removeprefix("the best is in "))
