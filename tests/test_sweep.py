"""Sweeps on a local Ray: what they find, that trials are runs of `fit`, and what they leave."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import wait_for
from sweeps import check_leaderboard, run_sweep, trial_processes

from raycontrolnet import SweepConfig, SweepResult, TrainConfig, fit, sweep
from raycontrolnet.cluster.nodes import HEAD, cluster_nodes
from raycontrolnet.config.cluster_settings import ClusterConfig
from raycontrolnet.errors import ConfigError
from raycontrolnet.training import metrics
from raycontrolnet.tune import checkpoint_folder
from raycontrolnet.tune.plan import plan_sweep

pytestmark = pytest.mark.usefixtures("_local_ray")

Settings = dict[str, Any]


def test_the_planted_learning_rate_wins(sweep_settings: Settings) -> None:
    rates = [4e-3, 1e-9, 0.3, 1e-8, 0.2, 1e-7]
    space = {"learning_rate": {"grid": rates}}
    train = TrainConfig(**sweep_settings | {"max_train_steps": 16, "validation_steps": 4})
    result = run_sweep(SweepConfig(train=train, space=space, num_samples=1, max_concurrent_trials=1))
    assert result.best is not None
    assert result.best.record.settings == {"learning_rate": 4e-3}
    states = [trial.record.state for trial in result.trials]
    assert states.count("stopped") >= 2
    assert set(states) == {"finished", "stopped"}
    for trial in result.trials:
        if trial.record.state == "stopped":
            assert trial.record.stopped_at == 4
            assert metrics.read(trial.folder / metrics.METRICS_FILE)[-1]["step"] == 4  # not a step too many
    check_leaderboard(result)


@pytest.mark.parametrize("num_workers", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_trial_is_a_run_of_fit(num_workers: str, eight: SweepResult, tmp_path: Path) -> None:
    """The same losses and measurements, bit for bit, as `fit` in this process or on Ray, from the trial's own file."""
    trial = eight.trials[0]
    assert trial.record.state == "finished"
    own = yaml.safe_load((trial.folder / "config.yaml").read_text())
    assert own["proportion_empty_prompts"] == trial.record.settings["proportion_empty_prompts"]
    output_dir = tmp_path / "plain"
    fit(TrainConfig(**own | {"output_dir": str(output_dir), "num_workers": num_workers}), stream=io.StringIO())
    for name in (metrics.METRICS_FILE, "validation.jsonl"):
        assert untimed(output_dir / name) == untimed(trial.folder / name)
    weights = "diffusion_pytorch_model.safetensors"
    assert (output_dir / weights).read_bytes() == (trial.folder / weights).read_bytes()


@pytest.fixture(scope="module")
def eight(tiny_base: Path, sweep_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """Return the result of a sweep of eight trials, with all that it leaves; do not change its folder."""
    folder = tmp_path_factory.mktemp("eight")
    train = TrainConfig(
        pretrained_model_name_or_path=str(tiny_base), train_data_dir=str(sweep_rows), output_dir=str(folder / "sweep"),
        resolution=32, max_train_steps=8, validation_steps=2, validation_split=4, checkpointing_steps=4, seed=0,
        lr_warmup_steps=0, hub_token="hf_secretsecret", latents_cache_dir=str(folder / "latents"),
    )  # fmt: skip
    return run_sweep(SweepConfig(train=train, num_samples=8))


def test_eight_trials_on_two_cpus(eight: SweepResult) -> None:
    """None waits for another, and nothing is left behind."""
    import ray

    assert len(eight.trials) == 8
    assert {trial.record.state for trial in eight.trials} <= {"finished", "stopped"}
    wait_for(lambda: ray.available_resources().get("CPU") == 3.0, timeout_s=20)
    wait_for(lambda: not trial_processes(), timeout_s=20)
    left = {path.name for path in eight.output_dir.iterdir()}
    assert left == {"best", "leaderboard.csv", "logs", "report.html", "sweep.json", "sweep.log", "trials"}
    assert {path.name for path in (eight.output_dir / "trials").iterdir()} == {f"{index:04d}" for index in range(8)}
    for trial in eight.trials:
        expected = "finished" if trial.record.state == "finished" else "stopped"
        assert json.loads((trial.folder / "run.json").read_text())["status"] == expected


def test_tunes_results_lead_to_the_weights(eight: SweepResult) -> None:
    assert eight.grid is not None
    assert len(eight.grid) == 8
    trials = {str(trial.folder): trial for trial in eight.trials}
    for result in eight.grid:
        trial = trials.pop(result.path)
        assert result.error is None
        assert result.config["learning_rate"] == trial.record.settings["learning_rate"]
        assert result.metrics["val_loss"] == trial.last["val_loss"]
        last = (trial.step or 0) // 4 * 4
        if last == 0:  # stopped before its first checkpoint
            assert result.checkpoint is None
            continue
        assert checkpoint_folder(result.checkpoint) == trial.folder / f"checkpoint-{last}"
        assert len(list(trial.folder.glob("checkpoint_*"))) == 1
    assert eight.best is not None
    assert eight.grid.get_best_result().metrics["val_loss"] == eight.best.value("val_loss")


def test_the_head_is_known() -> None:
    """It is none of the nodes that an autoscaler counts."""
    assert [HEAD in node for node in cluster_nodes(ClusterConfig()).nodes] == [True]


def test_the_best(eight: SweepResult) -> None:
    """best/: diffusers loads the weights, `train --config` and Python take the settings."""
    from diffusers import ControlNetModel

    from raycontrolnet import cli

    assert eight.best is not None
    assert eight.best_dir is not None
    best, folder = eight.best, eight.best_dir
    ControlNetModel.from_pretrained(folder)
    weights = "diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (best.folder / weights).read_bytes()
    config = cli.parse("train", ["--config", str(folder / "config.yaml")])
    assert config.learning_rate == best.record.settings["learning_rate"]
    assert config.output_dir == TrainConfig.output_dir
    card = (folder / "README.md").read_text()
    assert f"\n# {eight.output_dir.name}\n" in card
    assert str(folder) in card
    assert f"{best.value('val_loss'):.4g}" in card


def test_no_secret_is_left(eight: SweepResult) -> None:
    files = [path for path in eight.output_dir.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert not [path for path in files if b"hf_secretsecret" in path.read_bytes()]


@pytest.mark.slow
def test_optuna_proposes_from_what_it_has_seen(sweep_settings: Settings) -> None:
    pytest.importorskip("optuna")
    config = SweepConfig(
        train=TrainConfig(**sweep_settings), num_samples=3, searcher="optuna", max_concurrent_trials=1, resume=True
    )
    first = run_sweep(config)
    assert len({trial.record.settings["learning_rate"] for trial in first.trials}) == 3
    again = run_sweep(replace(config, num_samples=4))
    proposed = {trial.record.index: trial.record.settings for trial in again.trials}
    assert {trial.record.index: trial.record.settings for trial in first.trials}.items() <= proposed.items()
    assert len(proposed) == 4
    assert len({settings["learning_rate"] for settings in proposed.values()}) == 4


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"validation_split": 0}, {}, "--objective=val_loss: is measured on held-out rows, and none of these 24 rows"),
        ({}, {"objective": "control_fidelity"}, "--objective=control_fidelity: is measured on validation images"),
        ({"num_workers": "1:2"}, {}, "--num_workers=1:2: a sweep's trials need a fixed number"),
        ({"num_workers": "9"}, {}, "--num_workers=9: no trial has room in the cluster"),
        ({"use_gpu": True}, {}, "GPU"),
        ({"mixed_precision": None}, {"space": {"mixed_precision": {"choice": ["fp16"]}}}, "fp16: needs a GPU"),
        ({"pretrained_model_name_or_path": "/nowhere"}, {}, "/nowhere: no such folder"),
    ],
)
def test_refused_before_any_trial(
    sweep_settings: Settings, changes: Settings, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        run_sweep(SweepConfig(train=TrainConfig(**sweep_settings | changes), **{"num_samples": 1, **options}))
    assert words in str(error.value)
    assert not list(Path(sweep_settings["output_dir"]).glob("trials/*"))


def test_a_sweep_that_is_refused_leaves_no_folder(sweep_settings: Settings, tmp_path: Path) -> None:
    train = TrainConfig(**sweep_settings | {"validation_split": 0, "output_dir": str(tmp_path / "a" / "b")})
    with pytest.raises(ConfigError, match="none of these 24 rows are held out"):
        sweep(SweepConfig(train=train, num_samples=2), stream=io.StringIO())
    assert not (tmp_path / "a").exists()


def test_another_sweep_is_not_overwritten(eight: SweepResult, sweep_settings: Settings) -> None:
    before = (eight.output_dir / "sweep.json").read_bytes()
    config = SweepConfig(train=TrainConfig(**sweep_settings | {"output_dir": str(eight.output_dir)}), num_samples=8)
    with pytest.raises(ConfigError, match="holds a sweep; resume it with --resume, or name another folder"):
        run_sweep(config)
    with pytest.raises(
        ConfigError, match=r"--space: was .*proportion.* and is {'learning_rate': {'choice': \[0\.002\]}}"
    ):
        run_sweep(replace(config, space={"learning_rate": {"choice": [2e-3]}}, resume=True))
    other = replace(config.train, train_batch_size=2)
    with pytest.raises(ConfigError, match=r"--train_batch_size=2: was 4; a sweep is resumed with the same settings"):
        run_sweep(replace(config, train=other, resume=True))
    assert (eight.output_dir / "sweep.json").read_bytes() == before


def test_nothing_can_be_stopped_without_an_early_validation(sweep_settings: Settings) -> None:
    said = io.StringIO()
    plan = plan_sweep(SweepConfig(train=TrainConfig(**sweep_settings | {"validation_steps": 8}), num_samples=2), said)
    words = "sweep: no trial can be stopped early: the first validation from update 2 on comes at the end, 8; lower"
    assert words in said.getvalue()
    assert plan.grace_period == 8
    early = plan_sweep(
        SweepConfig(train=TrainConfig(**sweep_settings | {"max_train_steps": 100}), grace_period=7), said
    )
    assert early.grace_period == 8  # the first validation from there on


def test_a_learning_rate_that_only_rises(sweep_settings: Settings) -> None:
    """The space brings a schedule with a warm-up, and the default one is longer than the trials."""
    own = TrainConfig(**sweep_settings | {"lr_warmup_steps": 500})
    said = io.StringIO()
    plan_sweep(SweepConfig(train=own, num_samples=2), said)
    words = (
        "sweep: with --lr_scheduler=cosine the learning rate rises for --lr_warmup_steps=500 updates, and there are 8: "
        "it never comes to --learning_rate\n"
    )
    assert said.getvalue().count("the learning rate rises") == said.getvalue().count(words) == 1
    said = io.StringIO()
    plan_sweep(SweepConfig(train=own, space={"learning_rate": {"uniform": [1e-5, 1e-3]}}), said)
    assert "rises" not in said.getvalue()


def test_models_of_the_space_are_looked_at(sweep_settings: Settings, tiny_base: Path, tmp_path: Path) -> None:
    """Before Ray and latents, as that of a run."""
    other = shutil.copytree(tiny_base / "unet", tmp_path / "control")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps(config | {"_class_name": "ControlNetModel", "cross_attention_dim": 7})
    )
    space: dict[str, Any] = {
        "controlnet_model_name_or_path": {"choice": [str(other)]},
        "tokenizer_name": {"choice": [str(tiny_base / "tokenizer"), str(tiny_base)]},
    }
    with pytest.raises(ConfigError) as error:
        plan_sweep(SweepConfig(train=TrainConfig(**sweep_settings), space=space), io.StringIO())
    misfit = f"--controlnet_model_name_or_path={other}: made for another base model (cross_attention_dim 7, "
    assert [problem.startswith(misfit) for problem in error.value.problems] == [True, False]
    assert error.value.problems[1] == f"--tokenizer_name={tiny_base}: name the folder tokenizer in it"


def test_models_that_are_not_there(sweep_settings: Settings, tmp_path: Path) -> None:
    gone, file = tmp_path / "gone", tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump({"controlnet_model_name_or_path": {"choice": [str(gone)]}}))
    with pytest.raises(ConfigError) as error:
        plan_sweep(SweepConfig(train=TrainConfig(**sweep_settings), space=file), io.StringIO())
    problem = f"controlnet_model_name_or_path: {gone}: no such folder, and not the form of a Hub id (owner/name)"
    assert error.value.problems == (f"--space={file}: {problem}",)


def test_sizes_that_do_nothing(sweep_settings: Settings, tiny_base: Path, tiny_xl_base: Path) -> None:
    """Every base model of the space is looked at with every size, also where the others are right."""
    bases = {"pretrained_model_name_or_path": {"grid": [str(tiny_xl_base), str(tiny_base)]}}
    sizes = {"size_conditioning": {"grid": ["fixed", "real"]}, "crops_coords_top_left_h": {"grid": [0, 64]}}
    train = TrainConfig(**sweep_settings | {"latents_cache_dir": None})
    config = SweepConfig(train=train, space=bases | sizes, allow_new_caches=True)
    with pytest.raises(ConfigError) as error:
        plan_sweep(config, io.StringIO())
    beside, *others = error.value.problems
    assert beside.startswith("--crops_coords_top_left_h=64: with --size_conditioning real, each image has its own")
    assert sorted(others) == [
        f"--{given}: Stable Diffusion 1.x and 2.x is not conditioned on sizes; leave it out"
        for given in ("crops_coords_top_left_h=64", "size_conditioning=real")
    ]


@pytest.mark.slow
def test_a_trial_of_sdxl(sweep_settings: Settings, tiny_xl_base: Path, tmp_path: Path) -> None:
    """Trained from pixels, to be short; one of them also as `fit` trains it."""
    own = {"max_train_steps": 1, "validation_steps": 1, "checkpointing_steps": 1, "cache_latents": "off"}
    shared = sweep_settings | own | {"pretrained_model_name_or_path": str(tiny_xl_base), "latents_cache_dir": None}
    space = {"crops_coords_top_left_h": {"grid": [64]}}
    config = SweepConfig(train=TrainConfig(**shared), space=space, num_samples=1, scheduler="none")
    (trial,) = run_sweep(config).trials
    assert trial.record.state == "finished"
    plain = shared | {"crops_coords_top_left_h": 64, "output_dir": str(tmp_path / "plain"), "num_workers": "0"}
    fit(TrainConfig(**plain), stream=io.StringIO())
    ((alone,), (swept,)) = (untimed(folder / metrics.METRICS_FILE) for folder in (tmp_path / "plain", trial.folder))
    assert swept["loss"] == pytest.approx(alone["loss"], rel=1e-5)


@pytest.mark.slow
def test_data_sets_are_tried(sweep_settings: Settings, sweep_rows: Path, circles: Path, tmp_path: Path) -> None:
    """Each with a latent cache of its own, from which its trials learn what `fit` learns."""
    own = {"latents_cache_dir": None, "max_train_steps": None, "num_train_epochs": 2, "validation_steps": 4}
    train = TrainConfig(**sweep_settings | own)
    space = {"train_data_dir": {"grid": [str(circles), str(sweep_rows)]}}
    config = SweepConfig(train=train, space=space, num_samples=1, scheduler="none", allow_new_caches=True)
    assert plan_sweep(config, io.StringIO()).total_updates == 10  # of the larger one
    result = run_sweep(config)
    assert {Path(t.record.settings["train_data_dir"]).name: t.step for t in result.trials} == {
        circles.name: 6, sweep_rows.name: 10,
    }  # fmt: skip
    for trial in result.trials:
        output_dir = tmp_path / trial.record.name
        plain = {**sweep_settings, **own, **trial.record.settings, "output_dir": str(output_dir), "num_workers": "0"}
        fit(TrainConfig(**plain), stream=io.StringIO())
        assert untimed(output_dir / metrics.METRICS_FILE) == untimed(trial.folder / metrics.METRICS_FILE)


# Helpers


def untimed(path: Path) -> list[dict[str, Any]]:
    timed = ("time", "images_per_second", "seconds")
    found = [{name: value for name, value in line.items() if name not in timed} for line in metrics.read(path)]
    assert found
    return found
