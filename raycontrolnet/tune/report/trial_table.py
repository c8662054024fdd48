"""The table of all trials in a sweep's report: the settings of each and its results, the best first."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

from raycontrolnet.report.curves import STANDARD_ERRORS
from raycontrolnet.report.page import REPORT_FILE
from raycontrolnet.tune.records import Trial
from raycontrolnet.tune.report.charts import shade
from raycontrolnet.tune.report.history import SweepHistory, as_text

COLUMNS = {"val_loss": "held-out loss", "control_gap": "control gap", "control_fidelity": "control fidelity",
           "loss": "loss", "images_per_second": "images/s"}  # fmt: skip
"""Figure of the last report -> heading."""
CAUSE_LETTERS = 120
"""Longest cause; the trial's own report has all of it."""
VALUE_LETTERS = 60
UNKNOWN = "–"


class Row(NamedTuple):
    """A trial in the table."""

    trial: Trial
    report: str | None
    """Link to its own report, if there is one."""
    colour: str
    """CSS variable."""
    cause: str
    settings: list[tuple[str | None, str]]
    """Exact and short value of each."""
    figures: list[tuple[str, str]]
    """Value and error of each."""


def figures(swept: SweepHistory) -> list[str]:
    """Return the names of the figures in the table, the objective first."""
    others = [name for name in COLUMNS if name != swept.objective and any(name in t.last for t in swept.trials)]
    return [swept.objective, *others]


def rows(swept: SweepHistory) -> list[Row]:
    """Return all trials in rank order."""
    found = []
    for rank, trial in enumerate(swept.trials):
        cause = "" if trial.record.state == "stopped" else " ".join((trial.record.cause or "").split())
        found.append(
            Row(
                trial,
                report_of(trial),
                colour="best" if trial is swept.best else f"rank-{shade(rank, len(swept.trials))}",
                cause=_cut(cause, CAUSE_LETTERS),
                settings=[_setting(trial, setting.name) for setting in swept.settings],
                figures=[_figure(trial, name) for name in figures(swept)],
            )
        )
    return found


def report_of(trial: Trial) -> str | None:
    """Return the link to the trial's own report, if there is one."""
    return f"trials/{trial.record.name}/{REPORT_FILE}" if (trial.folder / REPORT_FILE).is_file() else None


def measured(trial: Trial, name: str, digits: int = 4) -> str:
    """Return a value of the last report; a dash without one."""
    value = trial.value(name)
    return f"{value:,.{digits}g}" if math.isfinite(value) else UNKNOWN


def _figure(trial: Trial, name: str) -> tuple[str, str]:
    error = trial.value("control_gap_error")
    if name == "control_gap" and math.isfinite(error) and name in trial.last:
        return measured(trial, name, 2), f"± {STANDARD_ERRORS * error:.1g}"
    return measured(trial, name, 3 if name == "images_per_second" else 4), ""


def _setting(trial: Trial, name: str) -> tuple[str | None, str]:
    if name not in trial.record.settings:
        return None, UNKNOWN
    value = trial.record.settings[name]
    short = f"{value:.3g}" if isinstance(value, float) else _cut(as_text(value), VALUE_LETTERS)
    return json.dumps(value, ensure_ascii=False, default=str), short


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
