"""Sweeps that are killed, interrupted or taken over, or whose trials fail: nothing is lost or left behind."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import ctrl_c, kill_9, wait_for, when, workers_called
from sweep_trials import losses
from sweeps import check_leaderboard, leaderboard, run_sweep, trial_processes

from raycontrolnet import SweepConfig, TrainConfig, fit, sweep
from raycontrolnet.errors import RunError
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training import held_out, metrics
from raycontrolnet.tune import records
from raycontrolnet.tune.lease import SweepLease

pytestmark = pytest.mark.usefixtures("_local_ray")

Settings = dict[str, Any]


def test_a_sweep_goes_on_with_what_is_left(sweep_settings: Settings) -> None:
    """More trials, and one that had been cut off: those that had ended are not trained again."""
    space = {"learning_rate": {"choice": [1e-3, 2e-3]}}
    config = SweepConfig(train=TrainConfig(**sweep_settings), space=space, num_samples=2, scheduler="none", resume=True)
    config = replace(config, max_concurrent_trials=1)  # one process for all trials: quicker
    first = run_sweep(config)
    before = {trial.record.index: (trial.folder / "run.json").read_bytes() for trial in first.trials}
    cut_off(first.trials[0].folder, step=4)
    records.write_record(first.output_dir, replace(first.trials[0].record, state="running"))
    said = io.StringIO()
    second = sweep(replace(config, num_samples=3), stream=said)
    assert "sweep: 2 trials" in said.getvalue()
    assert "--num_samples=3: there are 3 trials, and 2 combinations of values in the space: some" in said.getvalue()
    assert said.getvalue().count(" have the same settings, and so train the same\n") == 1
    assert [trial.record.state for trial in second.trials] == ["finished"] * 3
    by_index = {trial.record.index: trial for trial in second.trials}
    kept, mended = first.trials[1].record.index, first.trials[0].record.index
    assert (by_index[kept].folder / "run.json").read_bytes() == before[kept]
    assert figures(by_index[mended]) == figures(first.trials[0])
    third = sweep(replace(config, num_samples=3), stream=(said := io.StringIO()))  # nothing is left
    shown = [line.split()[:2] for line in said.getvalue().splitlines()[1:5]]
    assert shown == [["trial", "state"], *([trial.record.name, "finished"] for trial in third.trials)]
    assert [figures(trial) for trial in third.trials] == [figures(trial) for trial in second.trials]
    check_leaderboard(third)


def test_the_driver_is_killed(sweep_settings: Settings, tmp_path: Path) -> None:
    """With -9, in the midst; the trials of the sweep that goes on end as runs of their settings that nobody killed."""
    settings = sweep_settings | {"max_train_steps": 12, "cpus_per_worker": 1.0}
    of_sweep: Settings = {"num_samples": 2, "scheduler": "none"}
    of_sweep["max_concurrent_trials"] = 1  # so that one has ended
    disturbed = Path(sweep_settings["output_dir"])
    kill_9(
        tune_command(settings | of_sweep), lambda: "finished" in states(disturbed) and "running" in states(disturbed)
    )
    begun = {record.index: record.settings for record in records.read_records(disturbed)}
    finished = [record for record in records.read_records(disturbed) if ran_to_its_end(disturbed, record)]
    before = {record.index: (records.folder_of(disturbed, record) / "run.json").read_bytes() for record in finished}
    said = io.StringIO()
    sweep(SweepConfig(train=TrainConfig(**settings), resume=True, **of_sweep), stream=said)
    assert f"sweep: {2 - len(finished)} trial" in said.getvalue()
    for record in finished:
        assert (records.folder_of(disturbed, record) / "run.json").read_bytes() == before[record.index]
    trials = records.read_trials(disturbed, 2)
    assert [trial.record.state for trial in trials] == ["finished"] * 2
    assert begun.items() <= {trial.record.index: trial.record.settings for trial in trials}.items()
    for trial in trials:
        own = yaml.safe_load((trial.folder / "config.yaml").read_text())
        undisturbed = tmp_path / trial.record.name
        fit(TrainConfig(**own | {"output_dir": str(undisturbed), "num_workers": "0"}), stream=io.StringIO())
        assert losses(trial.folder) == losses(undisturbed)
        measured = [[line["val_loss"] for line in held_out.read(path)] for path in (trial.folder, undisturbed)]
        assert len(measured[0]) == 6
        assert measured[0] == measured[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "signal_whole_group"),
    [
        pytest.param(signal.SIGTERM, False, id="SIGTERM to the driver"),
        pytest.param(signal.SIGINT, True, id="Ctrl-C to the terminal"),
    ],
)
def test_signals(sweep_settings: Settings, number: signal.Signals, signal_whole_group: bool) -> None:
    output_dir = Path(sweep_settings["output_dir"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = tune_command(
        {**sweep_settings, "max_train_steps": 100_000, "checkpoints_total_limit": 100, "num_samples": 4}
    )

    def ready() -> bool:
        return states(output_dir).count("running") == 2 and bool(checkpoints(output_dir))

    process, said = ctrl_c(command, ready, whole_group=signal_whole_group, env=environment, number=number)
    assert process.returncode == 128 + number
    assert "Traceback" not in said
    assert said.splitlines()[-1] == (
        "Interrupted. 0 of 4 trials have ended and stand; the others go on from their last checkpoints with the same "
        f"command and --resume (--output_dir {output_dir})."
    )
    assert states(output_dir) == ["interrupted"] * 2
    assert json.loads((output_dir / "sweep.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_more_trials_than_cpus_of_two_workers_each(sweep_settings: Settings) -> None:
    """Nothing waits forever, and what is stopped leaves no process and holds no resource."""
    import ray

    changes = {"num_workers": "2", "cpus_per_worker": 0.5, "train_batch_size": 2}
    changes |= {"max_train_steps": 400, "validation_steps": 20, "checkpointing_steps": 400}
    train = TrainConfig(**sweep_settings | changes)
    space = {"learning_rate": {"grid": [1e-3, 1e-9]}}
    result = run_sweep(SweepConfig(train=train, space=space, num_samples=1))
    assert {trial.record.state for trial in result.trials} <= {"finished", "stopped"}
    (stopped,) = (trial for trial in result.trials if trial.record.state == "stopped")
    assert metrics.read(stopped.folder / metrics.METRICS_FILE)[-1]["step"] < 400, (
        "it was trained to its end all the same"
    )
    wait_for(lambda: ray.available_resources().get("CPU") == 3.0, timeout_s=20)
    wait_for(lambda: not workers_called("RayTrainWorker"), timeout_s=20)
    wait_for(lambda: not trial_processes(), timeout_s=20)


@pytest.mark.slow
def test_a_trial_is_killed(sweep_settings: Settings) -> None:
    """Its process, by the kernel's memory killer say: it goes on from its checkpoint, in another."""
    train = TrainConfig(**sweep_settings | {"max_train_steps": 20, "cpus_per_worker": 1})
    folder = Path(sweep_settings["output_dir"]) / "trials" / "0000"
    killed_at = []

    def kill() -> None:
        kill_the_trial()
        killed_at.append(last_checkpoint(folder))

    with when(lambda: last_checkpoint(folder) >= 6, kill) as done:
        result = run_sweep(SweepConfig(train=train, space={"learning_rate": {"choice": [1e-3]}}, num_samples=1))
    assert done
    assert killed_at[0] < 20, "it had ended already"
    assert result.trials[0].record.state == "finished"
    undisturbed = Path(sweep_settings["output_dir"]).with_name("undisturbed")
    plain = replace(train, learning_rate=1e-3, output_dir=str(undisturbed), num_workers="0")
    fit(plain, stream=io.StringIO())
    assert losses(folder) == losses(undisturbed)


@pytest.mark.slow
def test_a_trial_whose_process_is_lost_too_often(sweep_settings: Settings) -> None:
    train = TrainConfig(**sweep_settings | {"max_train_steps": 16, "max_failures": 0})
    config = SweepConfig(train=train, num_samples=2, max_concurrent_trials=1, scheduler="none", resume=True)
    folder = Path(sweep_settings["output_dir"]) / "trials" / "0000"
    with when(lambda: last_checkpoint(folder) >= 2, kill_the_trial) as done:
        result = run_sweep(config)
    assert done
    assert [trial.record.state for trial in result.trials] == ["finished", "failed"]
    cause = "its process was lost 1 times: killed, perhaps for its memory, or with its machine"
    assert result.trials[1].record.cause == cause


@pytest.mark.slow
def test_a_trial_that_goes_on_is_not_judged_again_for_what_it_was(sweep_settings: Settings) -> None:
    """The first trial passed the rung alone; of those that came later, all were better."""
    space = {"learning_rate": {"grid": [1e-9, 4e-3, 0.2]}}
    config = SweepConfig(
        train=TrainConfig(**sweep_settings), space=space, num_samples=1, max_concurrent_trials=1, resume=True
    )
    first = run_sweep(config)
    assert {trial.record.state for trial in first.trials} == {"finished", "stopped"}
    by_index = {trial.record.index: trial for trial in first.trials}
    assert by_index[0].record.state == by_index[1].record.state == "finished"
    cut_off(by_index[0].folder, step=6)
    records.write_record(first.output_dir, replace(by_index[0].record, state="running"))
    second = run_sweep(config)
    assert {trial.record.index: trial.record.state for trial in second.trials} == {
        trial.record.index: trial.record.state for trial in first.trials
    }
    assert [figures(trial) for trial in second.trials] == [figures(trial) for trial in first.trials]


def test_another_driver_takes_over(sweep_settings: Settings) -> None:
    """The first one ends, and says why, and does not touch what is the other's now."""
    output_dir = Path(sweep_settings["output_dir"])
    train = TrainConfig(**sweep_settings | {"max_train_steps": 100_000, "checkpoints_total_limit": 100})
    take_over = when(
        lambda: bool(checkpoints(output_dir)), lambda: SweepLease(RunFolder(str(output_dir)), "another").set()
    )
    with take_over as done, pytest.raises(RunError, match="Another driver goes on with the sweep in "):
        run_sweep(SweepConfig(train=train, num_samples=2))
    assert done
    assert (output_dir / ".sweep_id").read_text() == "another"
    assert set(states(output_dir)) == {"running"}
    assert json.loads((output_dir / "sweep.json").read_text())["status"] == "running"
    assert not (output_dir / "leaderboard.csv").exists()


def test_all_trials_fail(sweep_settings: Settings) -> None:
    space = {"learning_rate": {"choice": [1e38]}}
    with pytest.raises(RunError, match=r"No trial has come to a validation\. The first cause: The .* diverged"):
        run_sweep(SweepConfig(train=TrainConfig(**sweep_settings), space=space, num_samples=2))


def test_median_with_a_trial_that_diverges(sweep_settings: Settings) -> None:
    """It is tried again, marked, and the sweep goes on."""
    space = {"learning_rate": {"grid": [1e38, 1e-3, 2e-3, 4e-3, 0.2]}}
    config = SweepConfig(
        train=TrainConfig(**sweep_settings),
        space=space,
        num_samples=1,
        max_concurrent_trials=1,  # so that the last is compared with all the others
        scheduler="median",
        trial_retries=1,
    )
    result = run_sweep(config)
    found = {trial.record.settings["learning_rate"]: trial.record for trial in result.trials}
    states = {rate: record.state for rate, record in found.items()}
    assert states == {1e38: "failed", 1e-3: "finished", 2e-3: "finished", 4e-3: "finished", 0.2: "stopped"}
    failed = found[1e38]
    assert failed.attempts == 2
    assert failed.cause is not None
    assert "Training has diverged" in failed.cause
    assert result.trials[-1].record == failed
    assert leaderboard(result)[-1]["cause"] == failed.cause
    assert result.best == result.trials[0]


# Helpers


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


def cut_off(folder: Path, step: int) -> None:
    """Leave the folder as a run that was killed after its checkpoint of `step`."""
    for path in folder.glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    status = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(status | {"status": "running"}))


def figures(trial: records.Trial) -> list[dict[str, float]]:
    """Return a trial's reports, with its settings and without times."""
    found = [{name: value for name, value in report.items() if name != "images_per_second"} for report in trial.reports]
    assert found
    return [{**report, **trial.record.settings} for report in found]
