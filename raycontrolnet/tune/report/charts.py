"""Charts of a sweep as SVG, coloured by the page's style sheet like those of report/curves.py.

A trial looks the same in all charts: its colour shows its rank, its mark its state. Its marks and lines show its
settings under the mouse and link to its row in the page's table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raycontrolnet.report import curves
from raycontrolnet.report.curves import Column, finite
from raycontrolnet.text import short_number
from raycontrolnet.training.held_out import MIN_GAP_SHARE
from raycontrolnet.tune.records import Trial
from raycontrolnet.tune.report import scales
from raycontrolnet.tune.report.history import Setting, SweepHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHADES = 6
"""Colours from the best rank to the worst: --rank-0, --rank-1, ..."""
MOST_POINTS = 3000
"""Points of all curves in a chart together."""
AXIS_INCHES = 1.35
"""Distance of two axes of parallel coordinates."""
OUTLIER_QUARTILES = 3.0
OUTLIER_SHARE = 0.05
"""A value is an outlier beyond so many distances between the quartiles, and more than this share of the median."""

_PAINTS = curves.PAINTS | curves.stand_ins(
    ("card", "pale", "best", "bad", *(f"rank-{shade}" for shade in range(SHADES))), first=len(curves.PAINTS) + 1
)
_SHAPES = {"failed": "X", "running": ">", "interrupted": "D", "waiting": "D"}
"""State -> mark; others are round."""
_STAR = (5, 1, 0)
_PULLED = 1000
"""Drawing order above all other trials."""


def over_steps(swept: SweepHistory, column: str) -> str:
    """Draw what each trial reported of `column`, with a mark at its end and a line at each rung."""
    axes = curves.new_axes()
    lines = [(trial, x, y) for trial in reversed(swept.trials) for x, y in [_points(trial, column)] if x.size]
    most = max(2, MOST_POINTS // max(1, len(lines)))
    whole = _points(swept.best, column)[1] if swept.best else ()  # show all of the best
    low, high = _window([y for _, _, y in lines], keep=[*whole])
    if column == "control_gap" and swept.best:  # a gap that shows no control should not fill the chart
        least = MIN_GAP_SHARE * abs(swept.best.value("val_loss"))
        if math.isfinite(least):
            low, high = min(low, -least), max(high, least)
        axes.axhline(0, color=_PAINTS["ink"], linewidth=0.8)
    for step in swept.rungs:
        axes.axvline(step, color=_PAINTS["pale"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for order, (trial, x, y) in enumerate(lines, 3):
        some = np.unique(np.linspace(0, x.size - 1, min(x.size, most)).round().astype(int))
        look = _look(swept, trial)
        axes.plot(
            x[some], y[some], color=look.colour, linewidth=look.width, zorder=look.order + order, url=_url(trial)
        )  # fmt: skip
        if low <= y[-1] <= high:  # other curves leave the chart
            _mark(axes, swept, trial, float(x[-1]), float(y[-1]), order)
    curves.limit(axes, low, high)
    return _finish(axes, swept, column.replace("_", "-"), f"{column} of all trials over the steps")


def against(swept: SweepHistory, setting: Setting, number: int) -> str:
    """Draw the objective at the last report of each trial against its value of `setting`.

    Args:
        number: index of the chart, for its ids.
    """
    trials = _measured(swept)
    axes = curves.new_axes("")
    places = scales.places(setting, trials)
    values = np.array([trial.value(swept.objective) for trial in trials], dtype=np.float64)
    low, high = _window([values], keep=_keep(swept, swept.objective))
    scales.lay_out(axes, setting)
    for order, (trial, place, value) in enumerate(zip(trials, places, values, strict=True), 3):
        if math.isfinite(place):
            _mark(axes, swept, trial, float(place), float(np.clip(value, low, high)), order, larger=1.35)
    curves.limit(axes, low, high)
    return _finish(axes, swept, f"setting-{number}", f"{swept.objective} against {setting.name}")


def parallel(swept: SweepHistory) -> str:
    """Draw a line per trial through its values on an axis per setting and one of the objective, best at the top."""
    trials, settings = _measured(swept), swept.settings
    axes = curves.new_axes("", (max(curves.SIZE[0], AXIS_INCHES * (len(settings) + 0.6)), 3.9))
    axes.set_axis_off()
    values = np.array([trial.value(swept.objective) for trial in trials], dtype=np.float64)
    ends = _window([values], keep=_keep(swept, swept.objective))
    heights = [scales.heights(setting, trials) for setting in settings]
    best_first = ends if swept.smallest_is_best else ends[::-1]
    span = best_first[0] - best_first[1]
    heights.append((np.clip(values, *ends) - best_first[1]) / span if span else np.full(len(trials), 0.5))
    for i, setting in enumerate(settings):
        _upright(axes, i, setting.name, scales.ticks(setting))
    worst_best = [(0.0, best_first[1]), (1.0, best_first[0])] if span else [(0.5, ends[0])]
    _upright(axes, len(settings), swept.objective, [(y, short_number(float(f"{v:.3g}"))) for y, v in worst_best])
    for order, (trial, *path) in enumerate(zip(trials, *heights, strict=True), 3):
        look = _look(swept, trial)
        stopped = trial.record.state != "finished"
        axes.plot(
            range(len(path)), path, color=look.colour, linewidth=look.width, alpha=0.4 if stopped else 1.0,
            zorder=look.order + order, url=_url(trial),
        )  # fmt: skip
    axes.set_xlim(-0.15, len(settings) + 0.55)
    axes.set_ylim(-0.05, 1.22)
    return _finish(axes, swept, "parallel", f"settings and {swept.objective} of all trials")


def beyond(swept: SweepHistory) -> int:
    """Count the trials whose objective is drawn at the edge of the charts, far from the others."""
    values = np.array([trial.value(swept.objective) for trial in _measured(swept)], dtype=np.float64)
    low, high = _window([values], keep=_keep(swept, swept.objective))
    return int(((values < low) | (values > high)).sum())


def shade(rank: int, trials: int) -> int:
    """Return the number of the colour of rank `rank` (from 0) among `trials`."""
    return min(SHADES - 1, rank * SHADES // max(1, trials))


# Trials ---------------------------------------------------------------------------------------------------------------


def _points(trial: Trial, column: str) -> tuple[Column, Column]:
    """Return the steps and values that were reported."""
    steps = np.array([report["step"] for report in trial.reports], dtype=np.float64)
    return finite(steps, np.array([report.get(column, math.nan) for report in trial.reports], dtype=np.float64))


def _measured(swept: SweepHistory) -> list[Trial]:
    """Return the trials with an objective, the worst first: later ones are drawn above them."""
    return [trial for trial in reversed(swept.trials) if math.isfinite(trial.value(swept.objective))]


def _keep(swept: SweepHistory, column: str) -> Sequence[float]:
    """Return the value that must be visible: the best trial's last one."""
    value = swept.best.value(column) if swept.best else math.nan
    return [value] if math.isfinite(value) else []


def _window(values: Sequence[Column], keep: Sequence[float]) -> tuple[float, float]:
    """Return the range of `values` without outliers, such as those of a diverged trial, but with `keep`."""
    every = np.concatenate([np.zeros(0), *values])
    if not (every := every[np.isfinite(every)]).size:
        return 0.0, 1.0
    first, middle, third = np.percentile(every, [25, 50, 75])
    reach = max(OUTLIER_QUARTILES * (third - first), OUTLIER_SHARE * abs(middle)) if third > first else math.inf
    inside = every[(every >= first - reach) & (every <= third + reach)]
    return float(min(inside.min(), *keep, math.inf)), float(max(inside.max(), *keep, -math.inf))


class _Look(NamedTuple):
    """The look of a trial."""

    colour: str
    width: float
    order: int
    """Drawn above those with less."""


def _look(swept: SweepHistory, trial: Trial) -> _Look:
    if trial is swept.best:
        return _Look(_PAINTS["best"], 3.2, _PULLED)
    return _Look(_PAINTS[f"rank-{shade(swept.rank(trial), len(swept.trials))}"], 1.4, 0)


def _mark(
    axes: Axes, swept: SweepHistory, trial: Trial, x: float, y: float, order: int, *, larger: float = 1.0
) -> None:
    """Draw a star for the best, else a filled (finished) or hollow (stopped, running) mark, or a cross (failed)."""
    look, state = _look(swept, trial), trial.record.state
    best = trial is swept.best
    colour = _PAINTS["bad"] if state == "failed" else look.colour
    filled = best or state in ("finished", "failed")
    axes.plot(
        [x], [y], marker=_STAR if best else _SHAPES.get(state, "o"), markersize=larger * (12 if best else 6.5),
        markerfacecolor=colour if filled else _PAINTS["card"], markeredgecolor=_PAINTS["card"] if filled else colour,
        markeredgewidth=0.6 if filled else 1.6, linestyle="", zorder=look.order + order + 0.5,
        clip_on=False, url=_url(trial),
    )  # fmt: skip


def _url(trial: Trial) -> str:
    return f"trial:{trial.record.name}"


def _finish(axes: Axes, swept: SweepHistory, name: str, title: str) -> str:
    """Return the chart, with links from marks and lines to the rows of their trials."""
    tips = {trial.record.name: _tip(trial, swept.objective) for trial in swept.trials}

    def link(found: re.Match[str]) -> str:
        return f'<a href="#trial-{found[1]}"><title>{tips[found[1]]}</title>'

    return re.sub(r'<a xlink:href="trial:(\d+)"[^>]*>', link, curves.svg(axes, name, title, _PAINTS))


def _tip(trial: Trial, objective: str) -> str:
    value = trial.value(objective)
    ends = [f"{objective} {value:.4g}"] if math.isfinite(value) else []
    settings = [f"{name} {scales.label(scales.short_text(value), 40)}" for name, value in trial.record.settings.items()]
    return escape("; ".join([f"{trial.record.name} {trial.record.state}", *ends, *settings]))


def _upright(axes: Axes, x: int, name: str, ticks: Sequence[tuple[float, str]]) -> None:
    """Draw one axis of parallel coordinates."""
    with curves.own_style():
        axes.plot([x, x], [0, 1], color=_PAINTS["pale"], linewidth=1.2, zorder=2)
        text: dict[str, Any] = {"color": _PAINTS["ink"], "zorder": 2 * _PULLED, "size": 12}
        axes.text(x, 1.05, scales.two_lines(name), ha="center", va="bottom", **text)
        for height, words in ticks:
            axes.text(x + 0.04, height, scales.label(words), ha="left", va="center", **text)
