"""A sweep's report.html: what its folder tells on one page, for a phone too; without scripts or outside links.

    read (history.py) -> charts.py, timeline.py, trial_table.py -> the page

Every text that comes from a file is escaped; a policy in the page's head forbids it to load anything all the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from html import escape
from pathlib import Path

from raycontrolnet.report import page
from raycontrolnet.tune.records import Trial
from raycontrolnet.tune.report import charts, history
from raycontrolnet.tune.report.history import SweepHistory, read
from raycontrolnet.tune.report.timeline import timeline
from raycontrolnet.tune.report.trial_table import COLUMNS, link, measured, trial_table
from raycontrolnet.tune.results import BEST

_FACTS = ("objective", "mode", "searcher", "scheduler", "grace_period", "reduction_factor", "num_trials",
          "total_updates", "validation_steps", "concurrency", "reason", "seed")  # fmt: skip
"""Of sweep.json, in this order."""


def write_report(sweep_dir: Path) -> Path:
    """Write `sweep_dir`/report.html, whole or not at all: what the folder's files tell, and nothing else.

    The sweep may be going on, finished, interrupted, failed or hardly begun: what is missing or half written is left
    out.

    Returns:
        The report's path.
    """
    sweep_dir = Path(sweep_dir)
    return page.write(sweep_dir, _page(sweep_dir.resolve(), read(sweep_dir)))


def _page(folder: Path, swept: SweepHistory) -> str:
    name = str(swept.sweep.get("name") or folder.name)
    sections = [
        *_summary(name, swept), *_best(folder, swept), *_curves(swept), *_settings_tried(swept), *_when(swept),
        *_trials(swept), *_settings(swept),
    ]  # fmt: skip
    return page.frame(name, swept.state, sections, Path(__file__).with_name("sweep.css"))


def _summary(name: str, swept: SweepHistory) -> Iterable[str]:
    """In words and a few figures: how far, and what went wrong."""
    yield page.title(name, swept.state)
    yield f"<p>{_how_far(swept)}</p>"
    if swept.num_trials:
        yield page.progress(swept.state, sum(trial.record.ended for trial in swept.trials), swept.num_trials)
    if cause := swept.sweep.get("cause"):
        yield f'<p class="cause">{escape(str(cause))}</p>'
    if warning := history.too_early(swept.trials, swept.scheduler, swept.objective):
        words = escape(warning).replace("--grace_period", '<code class="seen">--grace_period</code>')
        yield f'<p class="warning">{words}</p>'
    yield from page.figures(_figures(swept))


def _how_far(swept: SweepHistory) -> str:
    counts = Counter(trial.record.state for trial in swept.trials)
    counts["waiting"] += swept.num_trials - len(swept.trials)
    states = {"finished": "finished", "stopped": "stopped early", "failed": "failed", "running": "running",
              "interrupted": "interrupted", "waiting": "to come"}  # fmt: skip
    found = [f"{counts[state]} {words}" for state, words in states.items() if counts[state]]
    total = swept.num_trials
    words = f"{total} trial{'s' * (total != 1)}: {', '.join(found)}" if total else "No trial has begun yet"
    if math.isfinite(seconds := swept.seconds("seconds")):
        words += f"; {page.time(seconds)} so far" if swept.state == "running" else f"; in {page.time(seconds)}"
    order = "smallest" if swept.smallest_is_best else "largest"
    ranking = f"Ranked by their last <code>{swept.objective}</code>, the {order} first"
    return f"{words}. {ranking}; stopped trials come after finished ones."


def _figures(swept: SweepHistory) -> Iterable[tuple[str, str, str]]:
    """(title, value, note) of each figure at the top; as HTML."""
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
        yield "time of all trials", page.time(machine_s), "one after another"
    stopped = [trial for trial in swept.trials if trial.record.state == "stopped"]
    if stopped and swept.total_updates:
        spared = sum(swept.total_updates - (trial.step or 0) for trial in stopped)
        share = spared / (swept.num_trials * swept.total_updates)
        yield "spared by stopping", f"{share:.0%}", f"{spared:,} updates"


def _best(folder: Path, swept: SweepHistory) -> Iterable[str]:
    """What one came for: the best settings."""
    if (best := swept.best) is None:
        yield '<p class="pale">No trial has been measured yet.</p>' if swept.trials else ""
        return
    so_far = " so far" if swept.state == "running" else ""
    state = "" if best.record.state == "finished" else f", {best.record.state}"
    yield f'<section class="card best">\n<h2>★ Best trial{so_far}: {link(best)}{state}</h2>'
    yield f"<p>{_objective(swept, best)}</p>"
    yield page.table(best.record.settings)
    if "control_gap" in best.last:
        step = best.control_since
        words = "No control yet." if step is None else f"Control has appeared at step {step:,}."
        yield f'<p class="control {"appeared" if step is not None else ""}">{words}</p>'
    if (folder / BEST).is_dir():
        yield f'<p>Its weights: <a href="{BEST}/"><code>{BEST}/</code></a></p>'
    yield "</section>"


def _objective(swept: SweepHistory, best: Trial) -> str:
    words = f"<b>{measured(best, swept.objective)}</b> at step {int(best.last['step']):,}"
    return f"{COLUMNS[swept.objective].capitalize()} {words}."


_LEGEND = """<p class="legend marks"><span><b class="best">★</b>best</span><span><b>●</b>finished</span>
<span><b>○</b>stopped</span><span><b>▷</b>running</span><span><b>◇</b>interrupted</span>
<span><b class="failed">✖</b>failed</span><span class="ranks">rank: first {shades} last</span></p>""".format(
    shades="".join(f'<i style="background: var(--rank-{shade})"></i>' for shade in range(charts.SHADES))
)


def _curves(swept: SweepHistory) -> Iterable[str]:
    """The objective and the held-out measure over the steps."""
    columns = dict.fromkeys((swept.objective, "val_loss", "control_gap"))
    seen = [
        name
        for name in columns
        if any(math.isfinite(report.get(name, math.nan)) for t in swept.trials for report in t.reports)
    ]
    if not seen:
        return
    yield f"<h2>Learning</h2>\n{_LEGEND}"
    if swept.rungs:
        steps = f"step{'s' * (len(swept.rungs) > 1)} {', '.join(f'{step:,}' for step in swept.rungs)}"
        yield f'<p class="pale">Dashed: where trials that are behind are stopped ({steps}).</p>'
    yield '<div class="cards two">'
    for name in seen:
        yield page.card(COLUMNS[name].capitalize(), {}, charts.over_steps(swept, name))
    yield "</div>"


def _settings_tried(swept: SweepHistory) -> Iterable[str]:
    """Each setting against the objective, then all together."""
    if swept.best is None or not swept.settings:
        return
    heading = COLUMNS[swept.objective]
    yield f"<h2>Settings and {heading}</h2>\n{_LEGEND}"
    words = "At the last report of each trial: a stopped one (hollow) had trained less."
    if beyond := charts.beyond(swept):
        words += f" {beyond} far from the others {'is' if beyond == 1 else 'are'} drawn at the edge."
    if any(setting.categories for setting in swept.settings):
        words += " Trials with the same value of a list are drawn side by side."
    yield f'<p class="pale">{words}</p>'
    yield '<div class="cards">'
    for number, setting in enumerate(swept.settings):
        yield page.card(page.breakable(setting.name), {}, charts.against(swept, setting, number))
    yield "</div>"
    drawn = charts.parallel(swept)
    width = drawn[drawn.index('viewBox="') :].split()[2]
    strip = f'<div class="wide parallel" tabindex="0" role="group" aria-label="Chart" style="--units: {width}px">'
    words = '<p class="legend">A line is a trial; the best is at the top. Pale: not finished.</p>'
    yield page.card("All settings together", {}, f"{words}\n{strip}{drawn}</div>")


def _when(swept: SweepHistory) -> Iterable[str]:
    if any(trial.record.started is not None for trial in swept.trials):
        yield "<h2>When they ran</h2>"
        yield '<section class="card">'
        yield from timeline(swept)
        yield "</section>"


def _trials(swept: SweepHistory) -> Iterable[str]:
    yield "<h2>Trials</h2>"
    if not swept.trials:
        yield '<p class="pale">No trial has begun yet.</p>'
        return
    yield from trial_table(swept)


def _settings(swept: SweepHistory) -> Iterable[str]:
    """Of the sweep, and those that its trials share."""
    if facts := {name: swept.sweep[name] for name in _FACTS if swept.sweep.get(name) is not None}:
        yield f"<h2>The sweep</h2>\n{page.table(facts)}"
    if isinstance(space := swept.sweep.get("space"), dict) and space:
        yield f"<h2>The space</h2>\n{page.table(space)}"
    if isinstance(settings := swept.sweep.get("settings"), dict):
        yield from page.settings("Settings that the trials share", settings)
    yield from page.versions(swept.sweep.get("versions"))
