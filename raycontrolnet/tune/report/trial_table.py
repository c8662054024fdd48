"""The table of all trials in a sweep's report: the settings of each and its results, the best first."""

from __future__ import annotations

import math
from typing import Any

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


def figures(swept: SweepHistory) -> list[str]:
    """Return the names of the figures in the table, the objective first."""
    others = [name for name in COLUMNS if name != swept.objective and any(name in t.last for t in swept.trials)]
    return [swept.objective, *others]


def colour(swept: SweepHistory, trial: Trial) -> str:
    """Return the CSS variable of the trial's colour."""
    return "best" if trial is swept.best else f"rank-{shade(swept.rank(trial), len(swept.trials))}"


def cause(trial: Trial) -> str:
    """Return why the trial failed or was interrupted, in short."""
    return "" if trial.record.state == "stopped" else _cut(" ".join((trial.record.cause or "").split()), CAUSE_LETTERS)


def report_of(trial: Trial) -> str | None:
    """Return the link to the trial's own report, if there is one."""
    return f"trials/{trial.record.name}/{REPORT_FILE}" if (trial.folder / REPORT_FILE).is_file() else None


def measured(trial: Trial, name: str, digits: int = 4) -> str:
    """Return a value of the last report; a dash without one."""
    value = trial.value(name)
    return f"{value:,.{digits}g}" if math.isfinite(value) else UNKNOWN


def figure(trial: Trial, name: str) -> tuple[str, str]:
    """Return a value of the last report, and its error."""
    error = trial.value("control_gap_error")
    if name == "control_gap" and math.isfinite(error) and name in trial.last:
        return measured(trial, name, 2), f"± {STANDARD_ERRORS * error:.1g}"
    return measured(trial, name, 3 if name == "images_per_second" else 4), ""


def setting(value: Any) -> str:
    """Return a setting's value in short."""
    return f"{value:.3g}" if isinstance(value, float) else _cut(as_text(value), VALUE_LETTERS)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
