"""The table of all trials in a sweep's report: what each tried and what came of it, the best first."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from html import escape
from typing import Any

from raycontrolnet.report import page
from raycontrolnet.report.curves import STANDARD_ERRORS
from raycontrolnet.tune.records import Trial, TrialRecord
from raycontrolnet.tune.report.charts import shade
from raycontrolnet.tune.report.history import SweepHistory, as_text

COLUMNS = {"val_loss": "held-out loss", "control_gap": "control gap", "control_fidelity": "control fidelity",
           "loss": "loss", "images_per_second": "images/s"}  # fmt: skip
"""Of the last report -> heading."""
CAUSE_LETTERS = 120
"""The trial's own report has all of them."""
VALUE_LETTERS = 60


def trial_table(swept: SweepHistory) -> Iterable[str]:
    """All trials in rank order, on a strip that a phone scrolls."""
    measured = [name for name in COLUMNS if name != swept.objective and any(name in t.last for t in swept.trials)]
    columns = [swept.objective, *measured]
    headings = [*(COLUMNS[name] for name in columns), "steps", "time"]
    settings = [setting.name for setting in swept.settings]
    yield '<div class="wide" tabindex="0" role="group" aria-label="Trials">\n<table class="trials">'
    cells = [f"<th>{page.breakable(name)}</th>" for name in settings] + [
        f'<th class="n">{name}</th>' for name in headings
    ]
    yield f'<thead><tr><th class="n">#</th><th>trial</th><th>state</th>{"".join(cells)}</tr></thead>\n<tbody>'
    for rank, trial in enumerate(swept.trials):
        yield _row(swept, trial, rank, settings, columns)
    yield "</tbody></table>\n</div>"


def _row(swept: SweepHistory, trial: Trial, rank: int, settings: list[str], columns: list[str]) -> str:
    record, best = trial.record, trial is swept.best
    colour = "best" if best else f"rank-{shade(rank, len(swept.trials))}"
    cells = [
        f'<td class="n">{rank + 1}</td>',
        f'<th scope="row"><i style="background: var(--{colour})"></i>{link(trial)}{" ★" if best else ""}</th>',
        f'<td class="how">{_state(record)}</td>',
        *(_setting(record, name) for name in settings),
        *(f'<td class="n">{_figure(trial, name)}</td>' for name in columns),
        f'<td class="n">{"–" if trial.step is None else f"{trial.step:,}"}</td>',
        f'<td class="n">{page.time(record.seconds) if record.seconds else "–"}</td>',
    ]  # fmt: skip
    return (
        f'<tr id="trial-{record.name}"{" class=" + chr(34) + "first" + chr(34) if best else ""}>{"".join(cells)}</tr>'
    )


def link(trial: Trial) -> str:
    """The trial's name, which leads to its report if there is one."""
    name = trial.record.name
    if not (trial.folder / page.REPORT_FILE).is_file():
        return name
    return f'<a href="trials/{name}/{page.REPORT_FILE}">{name}</a>'


def measured(trial: Trial, name: str, digits: int = 4) -> str:
    """A value of the last report, as HTML; a dash without one."""
    value = trial.value(name)
    return f"{value:,.{digits}g}" if math.isfinite(value) else "–"


def _figure(trial: Trial, name: str) -> str:
    error = trial.value("control_gap_error")
    if name == "control_gap" and math.isfinite(error) and name in trial.last:
        return f"{measured(trial, name, 2)} <small>± {STANDARD_ERRORS * error:.1g}</small>"
    return measured(trial, name, 3 if name == "images_per_second" else 4)


def _state(record: TrialRecord) -> str:
    words = f'<span class="{record.state}">{record.state}</span>'
    if record.state == "stopped" and record.stopped_at is not None:
        words += f" at {record.stopped_at:,}"
    if record.cause and record.state != "stopped":
        cause = " ".join(record.cause.split())
        short = cause if len(cause) <= CAUSE_LETTERS else cause[: CAUSE_LETTERS - 1] + "…"
        words += f"<small>{escape(short)}</small>"
    return words


def _setting(record: TrialRecord, name: str) -> str:
    """In few digits or letters; all of them under the mouse."""
    if name not in record.settings:
        return "<td>–</td>"
    value = record.settings[name]
    exact = json.dumps(value, ensure_ascii=False, default=str)
    return f'<td title="{escape(exact)}">{escape(_short(value))}</td>'


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    words = as_text(value)
    return words if len(words) <= VALUE_LETTERS else words[: VALUE_LETTERS - 1] + "…"
