"""A sweep's report.html: its folder on one page, for a phone too; without scripts or outside links.

    read (history.py) -> charts.py, timeline.py, trial_table.py -> templates/sweep.html

All text from files is escaped, and a policy in the page's head forbids it to load anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raycontrolnet.report import page
from raycontrolnet.text import counted, duration
from raycontrolnet.tune.report import charts, history, trial_table
from raycontrolnet.tune.report.history import SweepHistory, read
from raycontrolnet.tune.report.timeline import timeline
from raycontrolnet.tune.report.trial_table import COLUMNS, measured
from raycontrolnet.tune.results import BEST

TEMPLATE = Path(__file__).parent / "templates" / "sweep.html"
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


def _page(folder: Path, swept: SweepHistory) -> str:
    sweep = swept.sweep
    return page.render(
        TEMPLATE,
        name=str(sweep.get("name") or folder.name),
        state=swept.state,
        how_far=_how_far(swept),
        done=sum(trial.record.ended for trial in swept.trials),
        total=swept.num_trials,
        cause=sweep.get("cause"),
        warning=history.too_early(swept.trials, swept.scheduler, swept.objective),
        figures=list(_figures(swept)),
        swept=swept,
        objective=swept.objective,
        best_first="smallest" if swept.smallest_is_best else "largest",
        best=swept.best,
        table=trial_table,
        weights=BEST if (folder / BEST).is_dir() else None,
        shades=charts.SHADES,
        learning=list(_learning(swept)),
        **_settings_tried(swept),
        timeline=timeline(swept),
        facts={name: sweep[name] for name in _FACTS if sweep.get(name) is not None},
        space=_mapping(sweep.get("space")),
        shared=page.settings(_mapping(sweep.get("settings"))),
        versions=_mapping(sweep.get("versions")),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _how_far(swept: SweepHistory) -> str:
    counts = Counter(trial.record.state for trial in swept.trials)
    counts["waiting"] += swept.num_trials - len(swept.trials)
    states = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "running": "running",
              "interrupted": "interrupted", "waiting": "to come"}  # fmt: skip
    found = ", ".join(f"{counts[state]} {words}" for state, words in states.items() if counts[state])
    words = f"{counted(swept.num_trials, 'trial')}: {found}" if swept.num_trials else "No trial has begun yet"
    if math.isfinite(seconds := swept.seconds("seconds")):
        shown = duration(seconds, fine=True)
        words += f"; {shown} so far" if swept.state == "running" else f"; in {shown}"
    return words


def _figures(swept: SweepHistory) -> Iterable[tuple[str, str, str]]:
    """Yield title, value and note of each figure at the top."""
    if best := swept.best:
        where = f"trial {best.record.name}, step {int(best.last['step']):,}"
        yield f"best {COLUMNS[swept.objective]}", measured(best, swept.objective), where
    if with_gap := [trial for trial in swept.trials if "control_gap" in trial.last]:
        shown = sum(trial.control_since is not None for trial in with_gap)
        yield "with control", f"{shown} of {len(with_gap)}", "trials, at their last measurement"
    machine_s = swept.seconds("machine_seconds")
    if math.isnan(machine_s):
        machine_s = sum(trial.record.seconds for trial in swept.trials)
    if machine_s:
        yield "time of all trials", duration(machine_s, fine=True), "one after another"
    stopped = [trial for trial in swept.trials if trial.record.state == "stopped"]
    if stopped and swept.total_updates:
        spared = sum(swept.total_updates - (trial.step or 0) for trial in stopped)
        share = spared / (swept.num_trials * swept.total_updates)
        yield "spared by stopping", f"{share:.0%}", f"{spared:,} updates"


def _learning(swept: SweepHistory) -> Iterable[tuple[str, str]]:
    """Yield the objective and the held-out measure over the steps, as far as trials reported them."""
    for name in dict.fromkeys((swept.objective, "val_loss", "control_gap")):
        if any(math.isfinite(report.get(name, math.nan)) for trial in swept.trials for report in trial.reports):
            yield name, charts.over_steps(swept, name)


def _settings_tried(swept: SweepHistory) -> dict[str, Any]:
    """Return the charts of each setting against the objective, and of all together."""
    if swept.best is None or not swept.settings:
        return {"against": ()}
    parallel = charts.parallel(swept)
    return {
        "against": [(setting.name, charts.against(swept, setting, i)) for i, setting in enumerate(swept.settings)],
        "beyond": charts.beyond(swept),
        "categories": any(setting.categories for setting in swept.settings),
        "parallel": parallel,
        "parallel_width": parallel[parallel.index('viewBox="') :].split()[2],
    }
