"""Charts of a sweep as SVG, coloured by the page's style sheet like those of report/curves.py.

A trial looks the same in all charts: its colour shows its rank, its mark its state. Its marks and lines show its
settings under the mouse and link to its row in the page's table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from raycontrolnet.report import curves
from raycontrolnet.report.curves import Column, finite
from raycontrolnet.report.page import plain
from raycontrolnet.text import short_number
from raycontrolnet.training.held_out import MIN_GAP_SHARE
from raycontrolnet.tune.records import Trial
from raycontrolnet.tune.report import scales
from raycontrolnet.tune.report.history import SHADES, Setting, SweepHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 3000
"""Points of all curves in a chart together."""
AXIS_INCHES = 1.55
"""Distance of two axes of parallel coordinates."""
OUTLIER_QUARTILES = 3.0
OUTLIER_SHARE = 0.05
"""A value is an outlier beyond so many distances between the quartiles, and more than this share of the median."""

_PAINTS = curves.PAINTS | curves.stand_ins(
    ("card", "pale", "best", *(f"rank-{shade}" for shade in range(SHADES))), first=len(curves.PAINTS) + 1
)
_SHAPES = {"failed": "X", "running": ">", "interrupted": "D", "waiting": "D"}
"""State -> mark; others are round."""
_STAR = (5, 1, 0)
_PULLED = 1000
"""Drawing order above all other trials."""


def over_steps(history: SweepHistory, column: str) -> str:
    """Draw what each trial reported of `column`, with a mark at its end and a line at each rung."""
    axes = curves.new_axes()
    lines = [(trial, x, y) for trial in reversed(history.trials) for x, y in [_points(trial, column)] if x.size]
    most = max(2, MOST_POINTS // max(1, len(lines)))
    whole = _points(history.best, column)[1] if history.best else ()  # show all of the best
    low, high = _window([y for _, _, y in lines], keep=[*whole])
    if column == "control_gap" and history.best:  # a gap that shows no control should not fill the chart
        least = MIN_GAP_SHARE * abs(history.best.value("val_loss"))
        if math.isfinite(least):
            low, high = min(low, -least), max(high, least)
        axes.axhline(0, color=_PAINTS["ink"], linewidth=0.8)
    for step in history.rungs:
        axes.axvline(step, color=_PAINTS["pale"], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for order, (trial, x, y) in enumerate(lines, 3):
        some = np.unique(np.linspace(0, x.size - 1, min(x.size, most)).round().astype(int))
        _line(axes, history, trial, x[some], y[some], order)
        if low <= y[-1] <= high:  # other curves leave the chart
            _mark(axes, history, trial, float(x[-1]), float(y[-1]), order)
    curves.limit(axes, low, high)
    return _finish(axes, history, column.replace("_", "-"), f"{column} of all trials over the steps")


def against(history: SweepHistory, setting: Setting, number: int) -> str:
    """Draw the objective at the last report of each trial against its value of `setting`.

    Args:
        number: index of the chart, for its ids.
    """
    trials, values, low, high = _objectives(history)
    axes = curves.new_axes("")
    scales.lay_out(axes, setting)
    for order, (trial, place, value) in enumerate(zip(trials, scales.places(setting, trials), values, strict=True), 3):
        if math.isfinite(place):
            _mark(axes, history, trial, float(place), float(np.clip(value, low, high)), order, larger=1.35)
    curves.limit(axes, low, high)
    return _finish(axes, history, f"setting-{number}", f"{history.objective} against {setting.name}")


def parallel(history: SweepHistory) -> str:
    """Draw a line per trial through its values on an axis per setting and one of the objective, best at the top."""
    trials, values, low, high = _objectives(history)
    settings = history.settings
    axes = curves.new_axes("", (max(curves.SIZE[0], AXIS_INCHES * (len(settings) + 0.6)), 3.9))
    axes.set_axis_off()
    best, worst = (low, high) if history.smallest_is_best else (high, low)
    span = best - worst if curves.differ(low, high) else 0.0
    heights = [scales.heights(setting, trials) for setting in settings]
    heights.append((np.clip(values, low, high) - worst) / span if span else np.full(len(trials), 0.5))
    for i, setting in enumerate(settings):
        _upright(axes, i, setting.name, scales.ticks(setting))
    ticks = [(0.0, worst), (1.0, best)] if span else [(0.5, best)]
    _upright(axes, len(settings), history.objective, [(y, curves.tick(v, low, high)) for y, v in ticks])
    for order, (trial, *path) in enumerate(zip(trials, *heights, strict=True), 3):
        pale = trial.record.state != "finished"
        _line(axes, history, trial, range(len(path)), path, order, alpha=0.4 if pale else 1.0)
    axes.set_xlim(-0.15, len(settings) + 0.55)
    axes.set_ylim(-0.05, 1.22)
    return _finish(axes, history, "parallel", f"settings and {history.objective} of all trials")


def beyond(history: SweepHistory) -> int:
    """Count the trials whose objective is drawn at the edge of the charts, far from the others."""
    _, values, low, high = _objectives(history)
    return int(((values < low) | (values > high)).sum())


# Trials ---------------------------------------------------------------------------------------------------------------


def _points(trial: Trial, column: str) -> tuple[Column, Column]:
    """Return the steps and values that were reported."""
    steps = np.array([report["step"] for report in trial.reports], dtype=np.float64)
    return finite(steps, np.array([report.get(column, math.nan) for report in trial.reports], dtype=np.float64))


def _objectives(history: SweepHistory) -> tuple[list[Trial], Column, float, float]:
    """Return the trials with an objective, the worst first; their objectives; and the low and high end to draw."""
    trials = [trial for trial in reversed(history.trials) if math.isfinite(trial.value(history.objective))]
    values = np.array([trial.value(history.objective) for trial in trials], dtype=np.float64)
    best = history.best.value(history.objective) if history.best else math.nan  # must be visible
    return trials, values, *_window([values], keep=[best] if math.isfinite(best) else [])


def _window(values: Sequence[Column], keep: Sequence[float]) -> tuple[float, float]:
    """Return the range of `values` without outliers, such as those of a diverged trial, but with `keep`."""
    every = np.concatenate([np.zeros(0), *values])
    if not (every := every[np.isfinite(every)]).size:
        return 0.0, 1.0
    first, middle, third = np.percentile(every, [25, 50, 75])
    reach = max(OUTLIER_QUARTILES * (third - first), OUTLIER_SHARE * abs(middle)) if third > first else math.inf
    inside = every[(every >= first - reach) & (every <= third + reach)]
    return float(min(inside.min(), *keep, math.inf)), float(max(inside.max(), *keep, -math.inf))


def _line(
    axes: Axes, history: SweepHistory, trial: Trial, x: Sequence[float], y: Sequence[float], order: int, **look: Any
) -> None:
    best = trial is history.best
    axes.plot(
        x, y, color=_PAINTS[history.paints[trial.record.name]], linewidth=3.2 if best else 1.4,
        zorder=order + best * _PULLED, url=_url(trial), **look,
    )  # fmt: skip


def _mark(
    axes: Axes, history: SweepHistory, trial: Trial, x: float, y: float, order: int, *, larger: float = 1.0
) -> None:
    """Draw a star for the best, else a filled (finished) or hollow (stopped, running) mark, or a cross (failed)."""
    best, state = trial is history.best, trial.record.state
    colour = _PAINTS["ink" if state == "failed" else history.paints[trial.record.name]]
    filled = best or state in ("finished", "failed")
    axes.plot(
        [x], [y], marker=_STAR if best else _SHAPES.get(state, "o"), markersize=larger * (12 if best else 6.5),
        markerfacecolor=colour if filled else _PAINTS["card"], markeredgecolor=_PAINTS["card"] if filled else colour,
        markeredgewidth=0.6 if filled else 1.6, linestyle="", zorder=order + best * _PULLED + 0.5,
        clip_on=False, url=_url(trial),
    )  # fmt: skip


def _url(trial: Trial) -> str:
    return f"trial:{trial.record.name}"


def _finish(axes: Axes, history: SweepHistory, name: str, title: str) -> str:
    """Return the chart, with links from marks and lines to the rows of their trials."""
    tips = {trial.record.name: _tip(trial, history.objective) for trial in history.trials}

    def link(found: re.Match[str]) -> str:
        return f'<a href="#trial-{found[1]}"><title>{tips[found[1]]}</title>'

    return re.sub(r'<a xlink:href="trial:(\d+)"[^>]*>', link, curves.svg(axes, name, title, _PAINTS))


def _tip(trial: Trial, objective: str) -> str:
    value = trial.value(objective)
    ends = [f"{objective} {short_number(value)}"] if math.isfinite(value) else []
    settings = [f"{name} {scales.label(plain(value), 40)}" for name, value in trial.record.settings.items()]
    return escape("; ".join([f"{trial.record.name} {trial.record.state}", *ends, *settings]))


def _upright(axes: Axes, x: int, name: str, ticks: Sequence[tuple[float, str]]) -> None:
    """Draw one axis of parallel coordinates."""
    with curves.own_style():
        axes.plot([x, x], [0, 1], color=_PAINTS["pale"], linewidth=1.2, zorder=2)
        text: dict[str, Any] = {"color": _PAINTS["ink"], "zorder": 2 * _PULLED, "size": 12}
        axes.text(x, 1.05, scales.two_lines(name), ha="center", va="bottom", **text)
        for height, words in ticks:
            axes.text(x + 0.04, height, scales.label(words), ha="left", va="center", **text)
