"""Sweeps on a local Ray: what they find, that trials are runs of `fit`, and that nothing is lost or left behind."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from processes import ctrl_c, wait_for, when, workers_called

from raycontrolnet import SweepConfig, SweepResult, TrainConfig, fit, sweep
from raycontrolnet.cluster.nodes import HEAD, cluster_nodes
from raycontrolnet.config.settings import ClusterConfig
from raycontrolnet.errors import ConfigError, RunError
from raycontrolnet.training import metrics
from raycontrolnet.tune import checkpoint_folder, records
from raycontrolnet.tune.plan import plan_sweep
from raycontrolnet.tune.records import SweepLease

pytestmark = pytest.mark.usefixtures("_local_ray")

Settings = dict[str, Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough to hold some out."""
    from raycontrolnet.demo.shapes import write_shapes

    return write_shapes(tmp_path_factory.mktemp("rows"), 24, resolution=32)


@pytest.fixture
def settings(tiny_settings: Settings, rows: Path, tmp_path: Path) -> Settings:
    """Return the settings of a trial of 8 updates, with a measurement and a checkpoint every 2."""
    return tiny_settings | {
        "train_data_dir": str(rows),
        "output_dir": str(tmp_path / "sweep"),
        "max_train_steps": 8,
        "validation_steps": 2,
        "validation_split": 4,
        "checkpointing_steps": 2,
        "lr_warmup_steps": 0,
        "num_workers": "1",
        "cache_latents": "auto",
        "latents_cache_dir": str(tmp_path / "latents"),
    }


def test_the_planted_learning_rate_wins(settings: Settings) -> None:
    rates = [4e-3, 1e-9, 0.3, 1e-8, 0.2, 1e-7]
    space = {"learning_rate": {"grid": rates}}
    train = TrainConfig(**settings | {"max_train_steps": 16, "validation_steps": 4})
    result = swept(SweepConfig(train=train, space=space, num_samples=1, max_concurrent_trials=1))
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


def test_a_trial_is_a_run_of_fit(eight: SweepResult, tmp_path: Path) -> None:
    """The same losses and measurements, bit for bit, as `fit` in this process and on Ray, from the trial's own file."""
    trial = eight.trials[0]
    assert trial.record.state == "finished"
    own = yaml.safe_load((trial.folder / "config.yaml").read_text())
    assert own["proportion_empty_prompts"] == trial.record.settings["proportion_empty_prompts"]
    for num_workers in ("0", "1"):
        output_dir = tmp_path / f"plain-{num_workers}"
        fit(TrainConfig(**own | {"output_dir": str(output_dir), "num_workers": num_workers}), stream=io.StringIO())
        for name in (metrics.METRICS_FILE, "validation.jsonl"):
            assert untimed(output_dir / name) == untimed(trial.folder / name)
        weights = "diffusion_pytorch_model.safetensors"
        assert (output_dir / weights).read_bytes() == (trial.folder / weights).read_bytes()


def test_a_sweep_goes_on_with_what_is_left(settings: Settings) -> None:
    """More trials, and one that had been cut off: those that had ended are not trained again."""
    config = SweepConfig(train=TrainConfig(**settings), num_samples=2, scheduler="none", resume=True)
    first = swept(config)
    before = {trial.record.index: (trial.folder / "run.json").read_bytes() for trial in first.trials}
    cut_off(first.trials[0].folder, step=4)
    records.write_record(first.output_dir, replace(first.trials[0].record, state="running"))
    said = io.StringIO()
    second = sweep(replace(config, num_samples=3), stream=said)
    assert "sweep: 2 trials" in said.getvalue()
    assert [trial.record.state for trial in second.trials] == ["finished"] * 3
    by_index = {trial.record.index: trial for trial in second.trials}
    kept, mended = first.trials[1].record.index, first.trials[0].record.index
    assert (by_index[kept].folder / "run.json").read_bytes() == before[kept]
    assert figures(by_index[mended]) == figures(first.trials[0])
    third = swept(replace(config, num_samples=3))  # nothing is left
    assert [figures(trial) for trial in third.trials] == [figures(trial) for trial in second.trials]
    check_leaderboard(third)


def test_the_driver_is_killed(settings: Settings, tmp_path: Path) -> None:
    """With -9, in the midst; the sweep that goes on ends with the figures of one that was never disturbed."""
    flags = {**settings, "num_samples": 4, "scheduler": "none", "max_train_steps": 30, "cpus_per_worker": 1}
    own = {name: value for name, value in flags.items() if name not in ("num_samples", "scheduler")}
    train = TrainConfig(**own | {"output_dir": str(tmp_path / "undisturbed")})
    swept(SweepConfig(train=train, num_samples=4, scheduler="none"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    disturbed = Path(settings["output_dir"])
    command = tune_command(flags)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)
    try:
        wait_for(lambda: "finished" in states(disturbed) and "running" in states(disturbed), timeout_s=120)
    finally:
        for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with suppress(psutil.Error):
                child.kill()
        process.communicate()
    finished = [record for record in records.read_records(disturbed) if ran_to_its_end(disturbed, record)]
    before = {record.index: (records.folder_of(disturbed, record) / "run.json").read_bytes() for record in finished}
    again = subprocess.run([*command, "--resume"], check=True, capture_output=True, text=True, env=environment)
    assert f"sweep: {4 - len(finished)} trials" in again.stderr
    for record in finished:
        assert (records.folder_of(disturbed, record) / "run.json").read_bytes() == before[record.index]
    one, other = (records.read_trials(path, 2) for path in (disturbed, tmp_path / "undisturbed"))
    assert [trial.record.state for trial in one] == ["finished"] * 4
    assert [figures(trial) for trial in one] == [figures(trial) for trial in other]
    assert losses(one[3].folder) == losses(other[3].folder)


@pytest.mark.parametrize(
    "signal_whole_group",
    [pytest.param(False, id="to the driver", marks=pytest.mark.slow), pytest.param(True, id="to the terminal")],
)
def test_ctrl_c(settings: Settings, signal_whole_group: bool) -> None:
    output_dir = Path(settings["output_dir"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = tune_command({**settings, "max_train_steps": 100_000, "num_samples": 4})

    def ready() -> bool:
        return states(output_dir).count("running") == 2 and bool(checkpoints(output_dir))

    process, said = ctrl_c(command, ready, whole_group=signal_whole_group, env=environment)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1] == (
        "Interrupted. 0 of 4 trials have ended and stand; the others go on from their last checkpoints with the same "
        f"command and --resume (--output_dir {output_dir})."
    )
    assert states(output_dir) == ["interrupted"] * 2
    assert json.loads((output_dir / "sweep.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_more_trials_than_cpus_of_two_workers_each(settings: Settings) -> None:
    """Nothing waits forever, and what is stopped leaves no process and holds no resource."""
    import ray

    changes = {"num_workers": "2", "cpus_per_worker": 0.5, "train_batch_size": 2}
    changes |= {"max_train_steps": 400, "validation_steps": 20, "checkpointing_steps": 400}
    train = TrainConfig(**settings | changes)
    space = {"learning_rate": {"grid": [1e-3, 1e-9]}}
    result = swept(SweepConfig(train=train, space=space, num_samples=1))
    assert {trial.record.state for trial in result.trials} <= {"finished", "stopped"}
    (stopped,) = (trial for trial in result.trials if trial.record.state == "stopped")
    assert metrics.read(stopped.folder / metrics.METRICS_FILE)[-1]["step"] < 400, (
        "it was trained to its end all the same"
    )
    wait_for(lambda: ray.available_resources().get("CPU") == 3.0, timeout_s=20)
    wait_for(lambda: not workers_called("RayTrainWorker"), timeout_s=20)
    wait_for(lambda: not trial_processes(), timeout_s=20)


@pytest.fixture(scope="module")
def eight(tiny_base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """Return the result of a sweep of eight trials, with all that it leaves; do not change its folder."""
    folder = tmp_path_factory.mktemp("eight")
    train = TrainConfig(
        pretrained_model_name_or_path=str(tiny_base), train_data_dir=str(rows), output_dir=str(folder / "sweep"),
        resolution=32, max_train_steps=8, validation_steps=2, validation_split=4, checkpointing_steps=4, seed=0,
        lr_warmup_steps=0, hub_token="hf_secretsecret", latents_cache_dir=str(folder / "latents"),
    )  # fmt: skip
    return swept(SweepConfig(train=train, num_samples=8))


def test_eight_trials_on_two_cpus(eight: SweepResult) -> None:
    """None waits for another, and nothing is left behind."""
    import ray

    assert len(eight.trials) == 8
    assert {trial.record.state for trial in eight.trials} <= {"finished", "stopped"}
    wait_for(lambda: ray.available_resources().get("CPU") == 3.0, timeout_s=20)
    wait_for(lambda: not trial_processes(), timeout_s=20)
    left = {path.name for path in eight.output_dir.iterdir()}
    assert left == {"best", "leaderboard.csv", "logs", "report.html", "sweep.json", "sweep.log", "trials"}
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


def test_a_trial_is_killed(settings: Settings) -> None:
    """Its process, by the kernel's memory killer say: it goes on from its checkpoint, in another."""
    train = TrainConfig(**settings | {"max_train_steps": 40, "cpus_per_worker": 1})
    folder = Path(settings["output_dir"]) / "trials" / "0000"
    half_way = when(lambda: last_checkpoint(folder) >= 10, kill_the_trial)
    with half_way as done:
        result = swept(SweepConfig(train=train, space={"learning_rate": {"choice": [1e-3]}}, num_samples=1))
    assert done
    assert result.trials[0].record.state == "finished"
    undisturbed = Path(settings["output_dir"]).with_name("undisturbed")
    plain = replace(train, learning_rate=1e-3, output_dir=str(undisturbed), num_workers="0")
    fit(plain, stream=io.StringIO())
    assert losses(folder) == losses(undisturbed)


def test_a_trial_whose_process_is_lost_too_often(settings: Settings) -> None:
    train = TrainConfig(**settings | {"max_train_steps": 30, "max_failures": 0})
    config = SweepConfig(train=train, num_samples=2, max_concurrent_trials=1, scheduler="none", resume=True)
    folder = Path(settings["output_dir"]) / "trials" / "0000"
    with when(lambda: last_checkpoint(folder) >= 2, kill_the_trial) as done:
        result = swept(config)
    assert done
    assert [trial.record.state for trial in result.trials] == ["finished", "failed"]
    cause = "its process was lost 1 times: killed, perhaps for its memory, or with its machine"
    assert result.trials[1].record.cause == cause


def test_median_with_a_trial_that_diverges(settings: Settings) -> None:
    """It is tried again, marked, and the sweep goes on."""
    space = {"learning_rate": {"grid": [1e38, 1e-3, 2e-3, 4e-3, 0.2]}}
    train = TrainConfig(**settings)
    result = swept(SweepConfig(train=train, space=space, num_samples=1, scheduler="median", trial_retries=1))
    found = {trial.record.settings["learning_rate"]: trial.record for trial in result.trials}
    states = {rate: record.state for rate, record in found.items()}
    assert states == {1e38: "failed", 1e-3: "finished", 2e-3: "finished", 4e-3: "finished", 0.2: "stopped"}
    failed = found[1e38]
    assert failed.attempts == 2
    assert failed.cause is not None
    assert "training has diverged" in failed.cause
    assert result.trials[-1].record == failed
    assert leaderboard(result)[-1]["cause"] == failed.cause
    assert result.best == result.trials[0]


def test_a_trial_that_goes_on_is_not_judged_again_for_what_it_was(settings: Settings) -> None:
    """The first trial passed the rung alone; of those that came later, all were better."""
    space = {"learning_rate": {"grid": [1e-9, 4e-3, 0.2]}}
    config = SweepConfig(
        train=TrainConfig(**settings), space=space, num_samples=1, max_concurrent_trials=1, resume=True
    )
    first = swept(config)
    assert {trial.record.state for trial in first.trials} == {"finished", "stopped"}
    by_index = {trial.record.index: trial for trial in first.trials}
    assert by_index[0].record.state == by_index[1].record.state == "finished"
    cut_off(by_index[0].folder, step=6)
    records.write_record(first.output_dir, replace(by_index[0].record, state="running"))
    second = swept(config)
    assert {trial.record.index: trial.record.state for trial in second.trials} == {
        trial.record.index: trial.record.state for trial in first.trials
    }
    assert [figures(trial) for trial in second.trials] == [figures(trial) for trial in first.trials]


def test_another_driver_takes_over(settings: Settings) -> None:
    """The first one ends, and says why, and does not touch what is the other's now."""
    output_dir = Path(settings["output_dir"])
    train = TrainConfig(**settings | {"max_train_steps": 100_000})
    take_over = when(lambda: bool(checkpoints(output_dir)), lambda: SweepLease(output_dir, "another").set())
    with take_over as done, pytest.raises(RunError, match="Another driver goes on with the sweep in "):
        swept(SweepConfig(train=train, num_samples=2))
    assert done
    assert (output_dir / ".sweep_id").read_text() == "another"
    assert set(states(output_dir)) == {"running"}
    assert json.loads((output_dir / "sweep.json").read_text())["status"] == "running"
    assert not (output_dir / "leaderboard.csv").exists()


def test_all_trials_fail(settings: Settings) -> None:
    space = {"learning_rate": {"choice": [1e38]}}
    with pytest.raises(RunError, match=r"No trial has come to a validation\. The first cause: The .* diverged"):
        swept(SweepConfig(train=TrainConfig(**settings), space=space, num_samples=2))


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


def test_optuna_proposes_from_what_it_has_seen(settings: Settings) -> None:
    pytest.importorskip("optuna")
    config = SweepConfig(
        train=TrainConfig(**settings), num_samples=3, searcher="optuna", max_concurrent_trials=1, resume=True
    )
    first = swept(config)
    assert len({trial.record.settings["learning_rate"] for trial in first.trials}) == 3
    again = swept(replace(config, num_samples=4))
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
def test_refused_before_any_trial(settings: Settings, changes: Settings, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        swept(SweepConfig(train=TrainConfig(**settings | changes), **{"num_samples": 1, **options}))
    assert words in str(error.value)
    assert not list(Path(settings["output_dir"]).glob("trials/*"))


def test_another_sweep_is_not_overwritten(eight: SweepResult, settings: Settings) -> None:
    before = (eight.output_dir / "sweep.json").read_bytes()
    config = SweepConfig(train=TrainConfig(**settings | {"output_dir": str(eight.output_dir)}), num_samples=8)
    with pytest.raises(ConfigError, match="holds a sweep; resume it with --resume, or name another folder"):
        swept(config)
    with pytest.raises(
        ConfigError, match=r"--space: was .*proportion.* and is {'learning_rate': {'choice': \[0\.002\]}}"
    ):
        swept(replace(config, space={"learning_rate": {"choice": [2e-3]}}, resume=True))
    other = replace(config.train, train_batch_size=2)
    with pytest.raises(ConfigError, match=r"--train_batch_size=2: was 4; a sweep is resumed with the same settings"):
        swept(replace(config, train=other, resume=True))
    assert (eight.output_dir / "sweep.json").read_bytes() == before


def test_nothing_can_be_stopped_without_an_early_validation(settings: Settings) -> None:
    said = io.StringIO()
    plan = plan_sweep(SweepConfig(train=TrainConfig(**settings | {"validation_steps": 8}), num_samples=2), said)
    words = "sweep: no trial can be stopped early: the first validation from update 2 on comes at the end, 8; lower"
    assert words in said.getvalue()
    assert plan.grace_period == 8
    early = plan_sweep(SweepConfig(train=TrainConfig(**settings | {"max_train_steps": 100}), grace_period=7), said)
    assert early.grace_period == 8  # the first validation from there on


def test_a_learning_rate_that_only_rises(settings: Settings) -> None:
    """The space brings a schedule with a warm-up, and the default one is longer than the trials."""
    own = TrainConfig(**settings | {"lr_warmup_steps": 500})
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


def test_models_that_are_not_there(settings: Settings, tmp_path: Path) -> None:
    gone, file = tmp_path / "gone", tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump({"controlnet_model_name_or_path": {"choice": [str(gone)]}}))
    with pytest.raises(ConfigError) as error:
        plan_sweep(SweepConfig(train=TrainConfig(**settings), space=file), io.StringIO())
    problem = f"controlnet_model_name_or_path: {gone}: no such folder, and not the form of a Hub id (owner/name)"
    assert error.value.problems == (f"--space={file}: {problem}",)


def test_data_sets_are_tried(settings: Settings, rows: Path, circles: Path, tmp_path: Path) -> None:
    """Each with a latent cache of its own, from which its trials learn what `fit` learns."""
    own = {"latents_cache_dir": None, "max_train_steps": None, "num_train_epochs": 2, "validation_steps": 4}
    train = TrainConfig(**settings | own)
    space = {"train_data_dir": {"grid": [str(circles), str(rows)]}}
    config = SweepConfig(train=train, space=space, num_samples=1, scheduler="none", allow_new_caches=True)
    assert plan_sweep(config, io.StringIO()).total_updates == 10  # of the larger one
    result = swept(config)
    assert {Path(t.record.settings["train_data_dir"]).name: t.step for t in result.trials} == {
        circles.name: 6, rows.name: 10,
    }  # fmt: skip
    for trial in result.trials:
        output_dir = tmp_path / trial.record.name
        plain = {**settings, **own, **trial.record.settings, "output_dir": str(output_dir), "num_workers": "0"}
        fit(TrainConfig(**plain), stream=io.StringIO())
        assert untimed(output_dir / metrics.METRICS_FILE) == untimed(trial.folder / metrics.METRICS_FILE)


# Helpers


def swept(config: SweepConfig) -> SweepResult:
    return sweep(config, stream=io.StringIO())


def tune_command(flags: Mapping[str, Any]) -> list[str]:
    given = {name: value for name, value in flags.items() if value is not None and value is not False}
    return [sys.executable, "-m", "raycontrolnet", "tune", *(f"--{name}={value}" for name, value in given.items())]


def ran_to_its_end(sweep_dir: Path, record: records.TrialRecord) -> bool:
    file = records.folder_of(sweep_dir, record) / "run.json"
    return file.is_file() and json.loads(file.read_text())["status"] == "finished"


def states(sweep_dir: Path) -> list[str]:
    return [record.state for record in records.read_records(sweep_dir)]


def checkpoints(sweep_dir: Path) -> list[Path]:
    return list(sweep_dir.glob("trials/*/checkpoint-*/manifest.json"))


def last_checkpoint(folder: Path) -> int:
    found = [int(path.parent.name.partition("-")[2]) for path in folder.glob("checkpoint-*/manifest.json")]
    return max(found, default=0)


def kill_the_trial() -> None:
    max(trial_processes(), key=lambda process: process.create_time()).kill()  # others may be ending


def trial_processes() -> list[psutil.Process]:
    return workers_called("ray::ImplicitFunc")  # Tune's name for a function's process


def cut_off(folder: Path, step: int) -> None:
    """Leave the folder as a run that was killed after its checkpoint of `step`."""
    for path in folder.glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    status = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(status | {"status": "running"}))


def untimed(path: Path) -> list[dict[str, Any]]:
    timed = ("time", "images_per_second", "seconds")
    found = [{name: value for name, value in line.items() if name not in timed} for line in metrics.read(path)]
    assert found
    return found


def losses(folder: Path) -> list[float]:
    found = [line["loss"] for line in metrics.read(folder / metrics.METRICS_FILE)]
    assert found
    return found


def figures(trial: records.Trial) -> list[dict[str, float]]:
    """Return a trial's reports, with its settings and without times."""
    found = [{name: value for name, value in report.items() if name != "images_per_second"} for report in trial.reports]
    assert found
    return [{**report, **trial.record.settings} for report in found]


def leaderboard(result: SweepResult) -> list[dict[str, str]]:
    with (result.output_dir / "leaderboard.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def check_leaderboard(result: SweepResult) -> None:
    """Check that the leaderboard agrees with the trials' own files."""
    lines = leaderboard(result)
    assert [line["trial"] for line in lines] == [trial.record.name for trial in result.trials]
    for line in lines:
        folder = result.output_dir / "trials" / line["trial"]
        measured = [
            record for record in metrics.read(folder / "validation.jsonl") if record["step"] == int(line["step"])
        ]
        assert float(line["val_loss"]) == measured[-1]["val_loss"]
        assert float(line["control_gap"]) == measured[-1]["control_gap"]
        settings = json.loads((folder / "trial.json").read_text())["settings"]
        assert float(line["setting:learning_rate"]) == settings["learning_rate"]
    values = [float(line["val_loss"]) for line in lines if line["state"] == "finished"]
    assert values == sorted(values)
