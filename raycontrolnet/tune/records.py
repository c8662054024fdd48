"""A sweep's trials, read from their folders: the one record of them, also after a kill.

my-sweep/
    sweep.json          what the sweep is: space, objective, seed, state
    trials/0003/        all that a run leaves, and
        trial.json      its settings and its state; only the driver writes it
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raycontrolnet.config.sweep_config import OBJECTIVES
from raycontrolnet.config.train_config import TrainConfig, typed_settings
from raycontrolnet.config.values import setting_types
from raycontrolnet.errors import ConfigError
from raycontrolnet.report import run_history
from raycontrolnet.report.run_history import RunHistory, number
from raycontrolnet.storage.files import replace_text
from raycontrolnet.storage.resume import SWEEP_FILE
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.storage.stored_folder import DRIVER
from raycontrolnet.training import held_out
from raycontrolnet.training.schedule import due_steps

TRIALS_FOLDER = "trials"
TRIAL_FILE = "trial.json"

STATES = ("waiting", "running", "finished", "stopped", "failed", "interrupted")
ENDED = ("finished", "stopped", "failed")
"""States in which a trial is never trained again."""

Report = Mapping[str, float]
"""A trial's figures after `step` updates: step, loss (mean since the report before), images_per_second (mean since
then) and, where measured, val_loss, val_loss_shuffled, control_gap, control_gap_error, control_fidelity."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial: trial.json."""

    index: int
    """From 0, in the order of proposal."""
    settings: Mapping[str, Any]
    """The settings that the space names."""
    state: str = "waiting"
    """One of `STATES`."""
    cause: str | None = None
    """The reason why it failed."""
    stopped_at: int | None = None
    """The update at which it was stopped."""
    seconds: float = 0.0
    """Time from its start to its end, without pauses of the sweep."""
    started: float | None = None
    """Unix seconds."""
    attempts: int = 0
    """Number of times that its training has failed."""

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.index:04d}"

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True)
class Trial:
    """A trial with its reports."""

    record: TrialRecord
    folder: Path
    reports: Sequence[Report] = ()
    """Steps ascending."""

    @property
    def last(self) -> Report:
        """The last report; empty if there is none."""
        return self.reports[-1] if self.reports else {}

    @property
    def step(self) -> int | None:
        """Updates done, as far as known."""
        if self.record.stopped_at is not None:
            return self.record.stopped_at
        return int(self.last["step"]) if self.last else None

    @property
    def control_since(self) -> int | None:
        """The step since which every measurement shows control; None if the last does not."""
        return control_appeared(self.reports)

    def value(self, objective: str) -> float:
        """Return the objective at the last report; nan if it was not measured."""
        return self.last.get(objective, math.nan)


def run_folder_of(sweep: RunFolder, record: TrialRecord, role: str = DRIVER) -> RunFolder:
    """Return the folder of the trial's run; see `RunFolder.child`."""
    return sweep.child(f"{TRIALS_FOLDER}/{record.name}", role)


def folder_of(sweep_dir: Path, record: TrialRecord) -> Path:
    return sweep_dir / TRIALS_FOLDER / record.name


def write_record(sweep_dir: Path, record: TrialRecord) -> None:
    """Write trial.json, whole or not at all; makes the trial's folder."""
    folder = folder_of(sweep_dir, record)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / TRIAL_FILE, asdict(record))


def read_records(sweep_dir: Path, *, skip_damaged: bool = False) -> list[TrialRecord]:
    """Return all trials that were ever proposed, by index.

    Raises:
        ConfigError: a trial.json is damaged, unless those are to be skipped.
        OSError: one cannot be read, unless those are to be skipped.
    """
    records = []
    for file in sorted((sweep_dir / TRIALS_FOLDER).glob(f"*/{TRIAL_FILE}")):
        try:
            records.append(_record_of(json.loads(file.read_text(encoding="utf-8")), file.parent.name))
        except OSError:
            if not skip_damaged:
                raise
        except ValueError as error:
            if not skip_damaged:
                problem = f"{file}: is damaged ({error}); remove its folder, and that trial is trained anew"
                raise ConfigError([problem]) from error
    return sorted(records, key=lambda record: record.index)


def _record_of(content: Any, folder: str) -> TrialRecord:
    """Return the usable part of a trial.json.

    Raises:
        ValueError: it does not name the settings of the trial in `folder`.
    """
    found = content if isinstance(content, dict) else {}
    index, settings, cause = found.get("index"), found.get("settings"), found.get("cause")
    if type(index) is not int or not isinstance(settings, dict) or folder != f"{index:04d}":
        raise ValueError(f"it does not hold the settings of trial {folder}")
    typed, _ = typed_settings(settings, setting_types(TrainConfig), folder)  # JSON has lists where these are tuples
    seconds, started = number(found.get("seconds")), number(found.get("started"))
    return TrialRecord(
        index=index,
        settings=settings | typed,
        state=state if (state := found.get("state")) in STATES else "interrupted",
        cause=None if cause is None else str(cause),
        stopped_at=step if type(step := found.get("stopped_at")) is int else None,
        seconds=seconds if 0 <= seconds < math.inf else 0.0,
        started=started if math.isfinite(started) else None,
        attempts=attempts if type(attempts := found.get("attempts")) is int else 0,
    )


def read_trials(sweep_dir: Path, validation_steps: int, *, skip_damaged: bool = False) -> list[Trial]:
    """Return all trials with their reports, by index; see `read_records`."""
    records = read_records(sweep_dir, skip_damaged=skip_damaged)
    return [read_trial(sweep_dir, record, validation_steps) for record in records]


def read_trial(sweep_dir: Path, record: TrialRecord, validation_steps: int) -> Trial:
    folder = folder_of(sweep_dir, record)
    reports = read_reports(folder, validation_steps)
    if record.stopped_at is not None:
        reports = [report for report in reports if report["step"] <= record.stopped_at]
    return Trial(record, folder, reports)


def read_reports(folder: Path, validation_steps: int) -> list[Report]:
    """Return the figures of the run in `folder` at each validation so far, from its own files.

    Args:
        validation_steps: updates between validations, for a run without held-out rows.
    """
    run = run_history.read(folder)
    steps = [int(record["step"]) for record in run.held_out]
    steps = steps or due_steps(validation_steps, run.last_update, run.total_updates)
    by_step = {int(record["step"]): record for record in run.held_out}
    reports: list[Report] = []
    before = 0
    for step in steps:
        report: dict[str, float] = {"step": step, **_since(run, before, step)}
        report |= {
            name: float(value)
            for name in run_history.MEASUREMENT
            if (value := by_step.get(step, {}).get(name)) is not None
        }
        if step in run.fidelity:
            report["control_fidelity"] = run.fidelity[step].mean
        reports.append(report)
        before = step
    return reports


def _since(run: RunHistory, before: int, step: int) -> dict[str, float]:
    """Return figures of the updates in (before, step], without those that are not known."""
    among = (run.updates["step"] > before) & (run.updates["step"] <= step)
    found = {}
    losses, rates = (run.updates[name][among] for name in ("loss", "images_per_second"))
    if (losses := losses[np.isfinite(losses)]).size:
        found["loss"] = float(losses.mean())
    rates = rates[np.isfinite(rates) & (rates > 0)]
    if not before and rates.size > 1:
        rates = rates[1:]  # the first update waits for its data
    if rates.size:
        found["images_per_second"] = rates.size / float((1 / rates).sum())
    return found


def as_text(value: Any) -> str:
    """Return a setting's value as a person writes it; JSON if it is more than a word or a number."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def settings_of(trials: Sequence[Trial]) -> list[str]:
    """Return the names of all swept settings, in order of appearance."""
    return list(dict.fromkeys(name for trial in trials for name in trial.record.settings))


def control_appeared(reports: Sequence[Report]) -> int | None:
    """Return the step since which every measurement shows control; None if the last does not."""
    return held_out.control_appeared(with_control_gap(reports))


def with_control_gap(reports: Sequence[Report]) -> list[Report]:
    """Return the reports that have the held-out measures."""
    return [report for report in reports if all(name in report for name in run_history.MEASUREMENT)]


def measured(trials: Sequence[Trial], objective: str) -> list[Trial]:
    """Return the trials that did not fail and whose objective is known, the best first."""
    known = [trial for trial in trials if math.isfinite(trial.value(objective)) and trial.record.state != "failed"]
    return ranked(known, objective)


def ranked(trials: Sequence[Trial], objective: str) -> list[Trial]:
    """Return the best first: finished trials, then those that were stopped (they were behind), then the others.

    Among trials of the same group the objective at the last report decides; trials without one come last.
    """
    sign = 1.0 if OBJECTIVES[objective] == "min" else -1.0
    order = {"finished": 0, "stopped": 1, "running": 1, "interrupted": 1, "waiting": 2, "failed": 3}

    def key(trial: Trial) -> tuple[int, float, int]:
        value = trial.value(objective)
        return order[trial.record.state], math.inf if math.isnan(value) else sign * value, trial.record.index

    return sorted(trials, key=key)


def write_sweep(sweep_dir: Path, content: Mapping[str, Any]) -> None:
    """Write sweep.json, whole or not at all."""
    _replace(sweep_dir / SWEEP_FILE, content)


def read_sweep(sweep_dir: Path) -> dict[str, Any]:
    """Return the content of sweep.json; empty if there is none."""
    file = sweep_dir / SWEEP_FILE
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    replace_text(path, json.dumps(dict(content), indent=1) + "\n", sync=True)
