"""Runs with other objectives: caches, accumulation, workers, resuming and images as with the plain one; refusals."""

from __future__ import annotations

import io
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from reference import training, write_trained_controlnet
from runs import Settings, equal, flags, losses, run, train, weights
from test_held_out import MEASURED, NUM_HELD_OUT, loader_of, measured, shake

from raycontrolnet import GenerateConfig, SweepConfig, TrainConfig, cli, generate
from raycontrolnet.config.check_config import CheckConfig
from raycontrolnet.config.objective_settings import ObjectiveConfig
from raycontrolnet.errors import ConfigError
from raycontrolnet.launch.check import check
from raycontrolnet.training.held_out import measure
from raycontrolnet.tune.checks import warnings

EVERYTHING: Settings = {
    "snr_gamma": 5.0, "loss": "huber", "huber_delta": 0.3, "timestep_sampling": "logit_normal", "logit_mean": 0.3,
    "noise_offset": 0.1, "input_perturbation": 0.1, "rescale_betas_zero_snr": True,
}  # fmt: skip
"""Settings of an objective with all parts."""


@pytest.fixture
def settings(tiny_settings: Settings, tiny_base_v: Path) -> Settings:
    """Return the settings of a run of a base that predicts the velocity, with every part of the objective."""
    return tiny_settings | EVERYTHING | {"pretrained_model_name_or_path": str(tiny_base_v)}


@pytest.mark.parametrize("name", [*EVERYTHING, "high_noise"])
def test_every_part_changes_the_losses(name: str, settings: Settings, tmp_path: Path) -> None:
    """And the same seed gives the same ones."""
    plain = {key: value for key, value in settings.items() if key not in EVERYTHING}
    given = {"timestep_sampling": "high_noise"} if name == "high_noise" else {name: EVERYTHING[name]}
    given |= {"loss": "huber"} if name == "huber_delta" else {}
    given |= {"timestep_sampling": "logit_normal"} if name == "logit_mean" else {}
    found = losses(run(plain, tmp_path / "out", **given, max_train_steps=2))
    assert found != losses(run(plain, tmp_path / "plain", max_train_steps=2))
    assert found == losses(run(plain, tmp_path / "again", **given, max_train_steps=2))


def test_the_cache_changes_nothing(settings: Settings, tmp_path: Path) -> None:
    pixels = losses(run(settings, tmp_path / "pixels"))
    cache = {"cache_latents": "on", "latents_dtype": "float32", "latents_cache_dir": str(tmp_path / "cache")}
    cached = losses(run(settings, tmp_path / "cached", **cache))
    assert cached == pytest.approx(pixels, rel=1e-5)
    assert cached != pixels, "from the cache?"


def test_accumulation_changes_nothing(settings: Settings, tmp_path: Path) -> None:
    whole = losses(run(settings, tmp_path / "whole"))
    parts = losses(run(settings, tmp_path / "parts", train_batch_size=1, gradient_accumulation_steps=4))
    assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("_local_ray")
def test_two_workers_learn_what_one_does(settings: Settings, tmp_path: Path) -> None:
    one = losses(run(settings, tmp_path / "one"))
    changes: Settings = {"num_workers": "2", "cpus_per_worker": 1.0, "train_batch_size": 2}
    assert losses(run(settings, tmp_path / "two", **changes)) == pytest.approx(one, rel=0, abs=1e-5)


def test_resume_is_exact(settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that goes on with another noise schedule is told so."""
    whole = run(settings, tmp_path / "whole")
    parts = run(settings, tmp_path / "parts", max_train_steps=2)
    with caplog.at_level(logging.WARNING):
        run(settings, parts, resume_from_checkpoint="latest")
    assert losses(parts) == losses(whole)
    assert equal(weights(parts), weights(whole))
    assert "noise schedule" not in caplog.text
    changed = {"resume_from_checkpoint": "latest", "max_train_steps": 5, "rescale_betas_zero_snr": False}
    with caplog.at_level(logging.WARNING):
        run(settings, parts, **changed)
    assert "was trained with another noise schedule: its run had another --rescale_betas_zero_snr" in caplog.text


# --- the held-out measure ---


def test_held_out_rows_are_measured_alike(settings: Settings) -> None:
    """By the same figures with the same weights, whatever the objective, but for the schedule."""
    plain = {key: value for key, value in settings.items() if key not in EVERYTHING}
    found = []
    for given in (
        {},
        {name: value for name, value in EVERYTHING.items() if name != "rescale_betas_zero_snr"},
        {"rescale_betas_zero_snr": True},
    ):
        with training(plain | given) as state:
            shake(state)
            assert isinstance(state.objective, ObjectiveConfig)
            assert state.objective.snr_gamma == given.get("snr_gamma")
            record = measure(state, loader_of(plain))
        assert record is not None
        found.append([record._asdict()[name] for name in MEASURED])
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_the_first_measurement_of_trials_is_the_same(settings: Settings, tmp_path: Path) -> None:
    """With a learning rate of zero all are."""
    plain = {key: value for key, value in settings.items() if key not in EVERYTHING}
    plain |= {"learning_rate": 0.0, "validation_split": NUM_HELD_OUT, "validation_steps": 2}
    plain |= {"controlnet_model_name_or_path": str(_trained(plain, tmp_path))}
    given = {name: value for name, value in EVERYTHING.items() if name != "rescale_betas_zero_snr"}
    one, other = run(plain, tmp_path / "one"), run(plain, tmp_path / "other", **given)
    assert losses(one) != losses(other)
    assert measured(one) == measured(other)
    assert len(measured(one)) == 2


def _trained(settings: Settings, tmp_path: Path) -> Path:
    return write_trained_controlnet(Path(settings["pretrained_model_name_or_path"]), tmp_path / "controlnet")


# --- images ---


@pytest.fixture(scope="module")
def zero_snr_run(validated_settings: Settings, tiny_base_v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero_snr")
    changed = {"rescale_betas_zero_snr": True, "pretrained_model_name_or_path": str(tiny_base_v)}
    named = {"controlnet_model_name_or_path": str(write_trained_controlnet(tiny_base_v, folder / "controlnet"))}
    return run(validated_settings, folder / "run", **changed, **named)


def drawn(folder: Path, out: Path, settings: Settings, **changed: Any) -> list[bytes]:
    config = GenerateConfig(
        controlnet=str(folder),
        prompt=settings["validation_prompt"],
        image=settings["validation_image"],
        num_images=2,
        seed=settings["seed"],
        use_gpu=False,
        out=str(out),
        **changed,
    )
    return [path.read_bytes() for pair in generate(config, stream=io.StringIO()) for path in pair.images]


def test_images_are_drawn_with_the_runs_schedule(
    zero_snr_run: Path, validated_settings: Settings, tiny_base_v: Path, tmp_path: Path
) -> None:
    """The images of validation are those of `generate`, with the run, a checkpoint of it, or the weights alone."""
    validation = zero_snr_run / "validation" / "step-000004"
    validated = [path.read_bytes() for path in sorted(validation.glob("pair-*-image-??.png"))]
    assert len(validated) == 4
    assert drawn(zero_snr_run, tmp_path / "own", validated_settings) == validated
    assert drawn(zero_snr_run / "checkpoint-4", tmp_path / "last", validated_settings) == validated
    other = drawn(zero_snr_run, tmp_path / "other", validated_settings, rescale_betas_zero_snr=False)
    assert all(one != another for one, another in zip(other, validated, strict=True))
    manifest = json.loads((zero_snr_run / "checkpoint-4" / "manifest.json").read_text())
    assert manifest["settings"]["rescale_betas_zero_snr"] is True
    weights_alone = zero_snr_run / "checkpoint-4" / "controlnet"  # as on the Hub, without a config.yaml
    alone = Path(shutil.copytree(weights_alone, tmp_path / "alone"))
    changed = {"resolution": 32, "pretrained_model_name_or_path": str(tiny_base_v), "rescale_betas_zero_snr": True}
    assert drawn(alone, tmp_path / "from weights", validated_settings, **changed) == validated


def test_the_card_names_the_schedule(zero_snr_run: Path, validated_run: Any) -> None:
    options = ".from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing='trailing')\n"
    assert options in (zero_snr_run / "README.md").read_text()
    assert ".from_config(pipeline.scheduler.config)\n" in (validated_run.folder / "README.md").read_text()


def test_another_base_that_cannot_draw_so(
    zero_snr_run: Path, validated_settings: Settings, tiny_base: Path, tmp_path: Path
) -> None:
    start = "--rescale_betas_zero_snr: the base model predicts the noise (epsilon)"
    for given, end in (
        ({}, "; the run has it, --rescale_betas_zero_snr False draws without"),
        ({"rescale_betas_zero_snr": True}, "or name a base that has v_prediction"),
    ):
        base = {"pretrained_model_name_or_path": str(tiny_base)}
        with pytest.raises(ConfigError) as error:
            drawn(zero_snr_run, tmp_path / "out", validated_settings, **base, **given)
        (problem,) = error.value.problems
        assert problem.startswith(start)
        assert problem.endswith(end)
    without = {"pretrained_model_name_or_path": str(tiny_base), "rescale_betas_zero_snr": False}
    assert len(drawn(zero_snr_run, tmp_path / "out", validated_settings, **without)) == 4


# --- commands ---


def test_check_counts_the_objective(settings: Settings) -> None:
    """The operations are those of the plain one: the models' work is all that matters."""
    plain = {key: value for key, value in settings.items() if key not in EVERYTHING}
    counted = [check(CheckConfig(train=TrainConfig(**given)), stream=io.StringIO()) for given in (plain, settings)]
    assert counted[0].flop_per_sample == counted[1].flop_per_sample
    assert counted[0].dispatches < counted[1].dispatches


def test_refusals_on_the_command_line(tiny_settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, and a line for every problem that names the flag, by `train` and by `check`."""
    for command in ("train", "check"):
        for given, message in (
            (["--rescale_betas_zero_snr"], "--rescale_betas_zero_snr: the base model predicts the noise (epsilon)"),
            (["--snr_gamma", "-1"], "--snr_gamma=-1.0: must be a number above 0"),
            (["--snr_gamma", "nan"], "--snr_gamma"),
            (["--loss", "l1"], "--loss=l1: must be one of mse, huber"),
            (["--noise_offset=-0.5"], "--noise_offset=-0.5: must be a number of at least 0"),
        ):
            with pytest.raises(SystemExit) as end:  # of the parser, where a value is no number
                sys.exit(cli.main([command, *flags(tiny_settings), *given]))
            assert end.value.code == 2, given
            shown = capsys.readouterr().err
            assert message in shown
            assert "Traceback" not in shown


def test_parameters_without_effect_are_said(tiny_settings: Settings) -> None:
    """A run that was meant to be another one; in a sweep, trials with another loss just do not use them."""
    given = {"huber_delta": 0.5, "logit_mean": 1.0, "high_noise_power": 2.0, "timestep_sampling": "high_noise"}
    settings = tiny_settings | given | {"ema_decay": 0.9, "max_train_steps": 1}
    checked = io.StringIO()
    check(CheckConfig(train=TrainConfig(**settings)), stream=checked)
    for shown in (train(settings).shown, checked.getvalue()):
        assert "--huber_delta=0.5: has no effect without --loss huber\n" in shown
        assert "--logit_mean=1.0: has no effect without --timestep_sampling logit_normal\n" in shown
        assert "--ema_decay=0.9: has no effect without --use_ema\n" in shown
        assert "--high_noise_power" not in shown


def test_a_sweep_whose_measure_means_two_things(tiny_settings: Settings) -> None:
    for objective, name, warned in (
        ("val_loss", "rescale_betas_zero_snr", True),
        ("control_gap", "rescale_betas_zero_snr", True),
        ("control_fidelity", "rescale_betas_zero_snr", False),
        ("val_loss", "noise_offset", False),
    ):
        space = {name: {"choice": [0, 0.1] if name == "noise_offset" else [False, True]}}
        config = SweepConfig(train=TrainConfig(**tiny_settings), space=space, objective=objective)
        found = list(warnings(config, config.train, config.parsed_space, 1000))
        assert any("are measured at other noise levels" in line for line in found) == warned
