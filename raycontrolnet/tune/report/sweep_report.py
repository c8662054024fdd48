"""A sweep's report.html: its folder on one page, for a phone too; without scripts or outside links.

    read (history.py) -> charts.py, timeline.py -> templates/sweep.html

All text from files is escaped, and a policy in the page's head forbids it to load anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from raycontrolnet.report import page
from raycontrolnet.report.curves import digits
from raycontrolnet.storage.resume import SWEEP_FILE
from raycontrolnet.text import STANDARD_ERRORS, above, counted, duration, short_number, spread
from raycontrolnet.training.held_out import noise_of
from raycontrolnet.tune.records import TRIALS_FOLDER, Trial
from raycontrolnet.tune.report import charts
from raycontrolnet.tune.report.history import SHADES, SweepHistory, read, too_early
from raycontrolnet.tune.report.timeline import timeline
from raycontrolnet.tune.results import BEST_FOLDER

TEMPLATE = Path(__file__).parent / "templates" / "sweep.html"
COLUMNS = {"val_loss": "held-out loss", "control_gap": "control gap", "control_fidelity": "control fidelity",
           "loss": "loss", "images_per_second": "images/s"}  # fmt: skip
"""Figure of the last report -> heading."""
_MARKS = {"finished": "●", "stopped": "○", "running": "▷", "interrupted": "◇", "failed": "✖"}
"""State of a trial -> its mark in the charts."""
_FACTS = ("objective", "mode", "searcher", "scheduler", "grace_period", "reduction_factor", "num_trials",
          "total_updates", "validation_steps", "concurrency", "reason", "seed")  # fmt: skip
"""Entries of sweep.json, in this order."""


def write_report(sweep_dir: Path) -> Path:
    """Write `sweep_dir`/report.html from the folder's files, whole or not at all, and return its path.

    The sweep may be running, finished, interrupted, failed or hardly begun: what is missing or half written is left
    out.
    """
    sweep_dir = Path(sweep_dir)
    return page.write(sweep_dir, _page(sweep_dir.resolve(), read(sweep_dir)))


def _page(folder: Path, history: SweepHistory) -> str:
    sweep, reported = history.sweep, {name for trial in history.trials for name in trial.last}
    first = list(dict.fromkeys([history.objective, *({"control_gap"} & reported)]))
    return page.render(
        TEMPLATE,
        kind="sweep",
        status_file=SWEEP_FILE,
        name=str(sweep.get("name") or folder.name),
        state=history.state,
        how_far=_how_far(history),
        done=sum(trial.record.ended for trial in history.trials),
        total=history.num_trials,
        cause=sweep.get("cause"),
        warning=too_early(history.trials, history.scheduler, history.objective),
        figures=list(_figures(history)),
        history=history,
        objective=history.objective,
        best_first="smallest" if history.smallest_is_best else "largest",
        best=history.best,
        columns=COLUMNS,
        figures_first=first,
        figures_last=[name for name in COLUMNS if name in reported and name not in first],
        measured=partial(_measured, history),
        figure=partial(_figure, history),
        standard_errors=STANDARD_ERRORS,
        marks={
            state: mark for state, mark in _MARKS.items() if state in {trial.record.state for trial in history.trials}
        },
        report_of=_report_of,
        weights=BEST_FOLDER if (folder / BEST_FOLDER).is_dir() else None,
        shades=SHADES,
        learning=list(_learning(history)),
        **_settings_tried(history),
        timeline=timeline(history),
        facts={name: sweep[name] for name in _FACTS if sweep.get(name) is not None},
        space=_mapping(sweep.get("space")),
        shared=page.settings(_mapping(sweep.get("settings"))),
        versions=_mapping(sweep.get("versions")),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _how_far(history: SweepHistory) -> str:
    counts = Counter(trial.record.state for trial in history.trials)
    counts["waiting"] += history.num_trials - len(history.trials)
    states = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "running": "running",
              "interrupted": "interrupted", "waiting": "to come"}  # fmt: skip
    found = ", ".join(f"{counts[state]} {words}" for state, words in states.items() if counts[state])
    words = f"{counted(history.num_trials, 'trial')}: {found}" if history.num_trials else "No trial has begun yet"
    if math.isfinite(seconds := history.seconds("seconds")):
        shown = duration(seconds, fine=True)
        words += f"; {shown} so far" if history.state == "running" else f"; in {shown}"
    return words


def _figures(history: SweepHistory) -> Iterable[tuple[str, str, str]]:
    """Yield title, value and note of each figure at the top."""
    if best := history.best:
        where = f"trial {best.record.name}, step {int(best.last['step']):,}"
        yield f"best {COLUMNS[history.objective]}", _measured(history, best, history.objective), where
    if with_gap := [trial for trial in history.trials if "control_gap" in trial.last]:
        shown = sum(trial.control_since is not None for trial in with_gap)
        yield "with control", f"{shown} of {len(with_gap)}", "trials, at their last measurement"
    machine_s = history.seconds("machine_seconds")
    if math.isnan(machine_s):
        machine_s = sum(trial.record.seconds for trial in history.trials)
    if machine_s:
        yield "time of all trials", duration(machine_s, fine=True), "one after another"
    stopped = [trial for trial in history.trials if trial.record.state == "stopped"]
    if stopped and history.total_updates:
        spared = sum(history.total_updates - (trial.step or 0) for trial in stopped)
        share = spared / (history.num_trials * history.total_updates)
        yield "spared by stopping", f"{share:.0%}", f"{spared:,} updates"


def _learning(history: SweepHistory) -> Iterable[tuple[str, str]]:
    """Yield the objective and the held-out measure over the steps, as far as trials reported them."""
    for name in dict.fromkeys((history.objective, "val_loss", "control_gap")):
        if any(math.isfinite(report.get(name, math.nan)) for trial in history.trials for report in trial.reports):
            yield name, charts.over_steps(history, name)


def _settings_tried(history: SweepHistory) -> dict[str, Any]:
    """Return the charts of each setting against the objective, and of all together."""
    if history.best is None or not history.settings:
        return {"against": ()}
    parallel = charts.parallel(history)
    return {
        "against": [(setting.name, charts.against(history, setting, i)) for i, setting in enumerate(history.settings)],
        "beyond": charts.beyond(history),
        "categories": any(setting.categories for setting in history.settings),
        "parallel": parallel,
        "parallel_width": parallel[parallel.index('viewBox="') :].split()[2],
    }


def _report_of(trial: Trial) -> str | None:
    """Return the link to the trial's own report, if there is one."""
    name = f"{TRIALS_FOLDER}/{trial.record.name}/{page.REPORT_FILE}"
    return name if (trial.folder / page.REPORT_FILE).is_file() else None


def _measured(history: SweepHistory, trial: Trial, name: str) -> str:
    """Return a value of the last report, in as many digits as tell the trials apart; a dash without one."""
    if not math.isfinite(value := trial.value(name)):
        return "–"
    if name == "control_gap":
        return above(value, noise_of(trial.value("val_loss")), 2)
    known = [other for one in history.trials if math.isfinite(other := one.value(name))]
    return short_number(value, digits(min(known), max(known), least=3 if name == "images_per_second" else 4))


def _figure(history: SweepHistory, trial: Trial, name: str) -> tuple[str, str]:
    """Return a value of the last report, and its error."""
    error, noise = trial.value("control_gap_error"), noise_of(trial.value("val_loss"))
    known = name == "control_gap" and math.isfinite(error) and name in trial.last
    return _measured(history, trial, name), spread(error, noise) if known else ""
