"""Sweeps for tests: run one, and check what it leaves."""

from __future__ import annotations

import csv
import io
import json

import psutil
from processes import workers_called

from raycontrolnet import SweepConfig, SweepResult, sweep
from raycontrolnet.training import metrics


def run_sweep(config: SweepConfig) -> SweepResult:
    return sweep(config, stream=io.StringIO())


def trial_processes() -> list[psutil.Process]:
    return workers_called("ray::ImplicitFunc")  # Tune's name for a function's process


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
