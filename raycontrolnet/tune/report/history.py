"""The records in the folder of a sweep, in any state of it: a missing or half-written file counts as empty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from raycontrolnet.config.sweep_config import OBJECTIVES
from raycontrolnet.report.run_history import number
from raycontrolnet.storage.files import read_json
from raycontrolnet.storage.resume import SWEEP_FILE
from raycontrolnet.tune.records import (
    Trial,
    as_text,
    control_appeared,
    measured,
    ranked,
    read_trials,
    settings_of,
    with_control_gap,
)

CATEGORICAL = ("choice", "grid", "grid_search")
LOG_FROM_RATIO = 100
"""Numbers of an unknown distribution that differ by this factor get a logarithmic axis."""

SHADES = 6
"""Number of colours for the ranks of trials."""
STOPPING = ("asha", "median")
"""Schedulers that stop weak trials early."""


@dataclass(frozen=True)
class Setting:
    """A setting in which the trials differ, as an axis."""

    name: str
    log: bool = False
    categories: tuple[str, ...] | None = None
    """Values as text, in the order of the space; None for a number on a scale."""
    low: float = math.nan
    """Lower end of the scale of numbers."""
    high: float = math.nan

    def place(self, value: Any) -> float:
        """Return the place of a value on the axis: the number, or its place among the categories; nan for none."""
        if self.categories is None:
            return place if self.low <= (place := number(value)) <= self.high else math.nan
        return float(self.categories.index(text)) if (text := as_text(value)) in self.categories else math.nan


@dataclass(frozen=True)
class SweepHistory:
    """The records of one sweep."""

    sweep: Mapping[str, Any]
    """sweep.json."""
    trials: Sequence[Trial]
    """All trials, the best first."""

    @property
    def state(self) -> str:
        """State of the sweep: running, finished, interrupted, failed; unknown without sweep.json."""
        return str(self.sweep.get("status", "unknown"))

    @property
    def objective(self) -> str:
        """Figure by which the trials are ranked."""
        named = str(self.sweep.get("objective"))
        return named if named in OBJECTIVES else "val_loss"

    @property
    def smallest_is_best(self) -> bool:
        return OBJECTIVES[self.objective] == "min"

    @property
    def scheduler(self) -> str:
        return str(self.sweep.get("scheduler"))

    @property
    def total_updates(self) -> int:
        """Updates of a trial that is not stopped; 0 if not known."""
        return self.count("total_updates")

    @property
    def num_trials(self) -> int:
        """Number of trials of the whole sweep."""
        return max(self.count("num_trials"), len(self.trials))

    @property
    def rungs(self) -> list[int]:
        """Updates at which asha stops trials that are behind; none for other schedulers."""
        found: list[int] = []
        step, factor = self.count("grace_period"), self.count("reduction_factor")
        while self.scheduler == "asha" and factor >= 2 and 1 <= step < self.total_updates:
            found.append(step)
            step *= factor
        return found

    @cached_property
    def best(self) -> Trial | None:
        """Trial that sweep.json names, else the first in rank; None if no trial has been measured."""
        known = measured(self.trials, self.objective)
        named = [trial for trial in known if trial.record.name == self.sweep.get("best")]
        return next(iter([*named, *known]), None)

    @cached_property
    def settings(self) -> list[Setting]:
        """Settings of the space; without a space, those of the trials."""
        space = self.sweep.get("space")
        specs = space if isinstance(space, dict) else {}
        names = list(specs) or settings_of(self.trials)
        return [
            _setting(name, specs.get(name), [t.record.settings[name] for t in self.trials if name in t.record.settings])
            for name in names
        ]

    @cached_property
    def paints(self) -> dict[str, str]:
        """Name of a trial -> CSS variable of its colour: best, or rank-0, rank-1, ... from best to worst."""
        found = {trial.record.name: f"rank-{i * SHADES // len(self.trials)}" for i, trial in enumerate(self.trials)}
        return found | ({self.best.record.name: "best"} if self.best else {})

    def count(self, name: str) -> int:
        """Return a count from sweep.json; 0 if it is not there."""
        return int(value) if 1 <= (value := number(self.sweep.get(name))) < 1e15 else 0

    def seconds(self, name: str) -> float:
        """Return a time from sweep.json; nan if it is not there."""
        return value if 0 <= (value := number(self.sweep.get(name))) < 1e12 else math.nan


def read(sweep_dir: Path) -> SweepHistory:
    """Read all records in `sweep_dir`."""
    history = SweepHistory(read_json(sweep_dir / SWEEP_FILE), ())
    trials = read_trials(sweep_dir, history.count("validation_steps") or 100, skip_damaged=True)
    return replace(history, trials=ranked(trials, history.objective))


def _setting(name: str, spec: Any, values: Sequence[Any]) -> Setting:
    """Return the axis for the values that trials have of a setting, and for those that its space allows.

    Args:
        spec: entry of the space, such as {"loguniform": [2e-6, 1e-4]}.
    """
    kind, given = next(iter(spec.items()), ("", ())) if isinstance(spec, dict) else ("", ())
    allowed = list(given) if isinstance(given, (list, tuple)) else [given]
    numbers = [value for value in map(number, values) if math.isfinite(value)]
    if kind in CATEGORICAL or len(numbers) < len(values):
        listed = allowed if kind in CATEGORICAL else []
        return Setting(name, categories=tuple(dict.fromkeys(map(as_text, [*listed, *values]))))
    numbers += [value for value in map(number, allowed[:2]) if math.isfinite(value)]
    low, high = min(numbers, default=0.0), max(numbers, default=1.0)
    log = low > 0 and ("log" in str(kind) or (not kind and high / low >= LOG_FROM_RATIO))
    return Setting(name, log, None, low, high)


def too_early(trials: Sequence[Trial], scheduler: str, objective: str) -> str | None:
    """Return a warning if trials were stopped before any had shown control.

    Returns:
        None if there is nothing to warn of, control was not measured, or trials are ranked by speed.
    """
    stops = [trial.record.stopped_at for trial in trials if trial.record.state == "stopped"]
    first = min((step for step in stops if step is not None), default=None)
    if scheduler not in STOPPING or objective == "images_per_second" or first is None:
        return None
    till_then = [with_control_gap([report for report in trial.reports if report["step"] <= first]) for trial in trials]
    if not any(till_then) or any(control_appeared(reports) is not None for reports in till_then):
        return None
    return (
        f"No trial had shown control by step {first:,}, where the first were stopped: their order then says little "
        "about where control appears (it comes suddenly, arXiv:2302.05543 section 4). A longer --grace_period is safer."
    )
