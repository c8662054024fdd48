"""The scales of a sweep's charts: places of a setting's values, and their labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from raycontrolnet.report import curves
from raycontrolnet.report.curves import Column
from raycontrolnet.text import short_number
from raycontrolnet.tune.records import Trial
from raycontrolnet.tune.report.history import Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LABELS = 8
"""Labels of an axis with categories."""
LABEL_LETTERS = 14


def label(text: str, most: int = LABEL_LETTERS) -> str:
    """Shorten `text`, and keep only letters that matplotlib's font has: it measures them."""
    known = "".join(letter if letter.isprintable() and letter < "\u0250" else "?" for letter in text)
    return known if len(known) <= most else known[: most - 1] + "…"


def places(setting: Setting, trials: Sequence[Trial]) -> Column:
    """Return the places of the trials on the axis (nan for none); those of one category are put side by side."""
    name, given = setting.name, [trial.record.settings for trial in trials]
    found = np.array([setting.place(one[name]) if name in one else math.nan for one in given], dtype=np.float64)
    for category in range(len(setting.categories or ())):
        there = np.flatnonzero(found == category)
        found[there] += (np.arange(there.size) * 0.618 % 1 - 0.5) * 0.5 if there.size > 1 else 0
    return found


def heights(setting: Setting, trials: Sequence[Trial]) -> Column:
    """Return the places as numbers between 0 and 1; nan for none, where a line breaks."""
    found = places(setting, trials)
    if setting.categories is not None:
        return (found + 0.5) / max(1, len(setting.categories))
    low, high = _scale(setting, setting.low), _scale(setting, setting.high)
    scaled = np.log10(found) if setting.log else found
    return (scaled - low) / (high - low) if high > low else np.where(np.isnan(scaled), math.nan, 0.5)


def lay_out(axes: Axes, setting: Setting) -> None:
    """Lay out the horizontal axis for `setting`."""
    from matplotlib.ticker import MaxNLocator

    if setting.categories is not None:
        shown = _labelled(setting.categories)
        with curves.own_style():
            axes.set_xticks(list(shown), [label(setting.categories[place]) for place in shown])
        axes.set_xlim(-0.6, len(setting.categories) - 0.4)
        return
    if setting.log:
        _log_axis(axes, setting)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    low, high = _scale(setting, setting.low), _scale(setting, setting.high)
    margin = 0.04 * (high - low) or 0.5
    axes.set_xlim(*(10**end if setting.log else end for end in (low - margin, high + margin)))


def _log_axis(axes: Axes, setting: Setting) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    few = setting.high / setting.low < 100  # else the labels would overlap
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=9))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(setting, value)))


def ticks(setting: Setting) -> list[tuple[float, str]]:
    """Return height (0 to 1) and text of the labels of an axis of parallel coordinates."""
    if setting.categories is not None:
        count = max(1, len(setting.categories))
        return [((place + 0.5) / count, setting.categories[place]) for place in _labelled(setting.categories)]
    if setting.low == setting.high:
        return [(0.5, _number(setting, setting.low))]
    low, high = _scale(setting, setting.low), _scale(setting, setting.high)
    middle = (low + high) / 2
    return [
        (height, _number(setting, 10**value if setting.log else value))
        for height, value in ((0.0, low), (0.5, middle), (1.0, high))
    ]


def _number(setting: Setting, value: float) -> str:
    """Return a label; 0.00012 as 1.2e-4 on a logarithmic axis."""
    if not setting.log:
        return curves.tick(value, setting.low, setting.high)
    digits = curves.digits(setting.low, setting.high, least=2)
    if value >= 1e-3:
        return short_number(value, digits)
    number, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{float(number):g}e{int(exponent)}"


def two_lines(name: str) -> str:
    """Break the name of a setting in its middle, so that it stays near its axis."""
    words = label(name, 2 * LABEL_LETTERS).split("_")
    if len(name) <= LABEL_LETTERS or len(words) < 2:
        return "_".join(words)
    ways = [("_".join(words[:i]) + "_", "_".join(words[i:])) for i in range(1, len(words))]
    return "\n".join(min(ways, key=lambda way: max(map(len, way))))


def _labelled(categories: Sequence[str]) -> Sequence[int]:
    """Return the places of the categories that get a label."""
    return range(0, len(categories), math.ceil(len(categories) / MOST_LABELS) or 1)


def _scale(setting: Setting, value: float) -> float:
    return math.log10(value) if setting.log else value
