"""Curves of a run as SVG inside a page: drawn by matplotlib, coloured by the page's style sheet.

A curve of any number of updates is thinned to at most `MOST_POINTS`. matplotlib is imported when the first curve is
drawn, so that nothing else waits for it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from raycontrolnet.text import STANDARD_ERRORS, short_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Column = npt.NDArray[np.float64]
"""A value per update or measurement, steps ascending."""

MOST_POINTS = 400
SMOOTHED_SHARE = 0.08
"""Share of the updates that the smooth curve averages around each."""
MARKED_POINTS = 40
"""Curves of up to this many points get a mark at each."""
PRECISION = 1e-7
"""Share of a number below which another of 32 bits does not differ from it."""

SIZE = (5.0, 3.0)
"""Inches of 72 units: a phone is 360 units wide, and text of 12 units is readable there."""


def stand_ins(variables: Sequence[str], first: int = 1) -> dict[str, str]:
    """Return CSS variable -> the colour, used nowhere else, that replaces it while matplotlib draws."""
    return {variable: "#" + 3 * f"{grey:02x}" for grey, variable in enumerate(variables, first)}


PAINTS = stand_ins(("ink", "grid", "loss", "held-out", "gap", "speed", "lr", "fidelity"))


class Points(NamedTuple):
    """A thinned curve: neighbours are one point; all columns have one length."""

    x: Column
    mean: Column
    low: Column
    high: Column


def thin(x: Column, y: Column, most: int = MOST_POINTS) -> Points:
    """Return the mean, smallest and largest of at most `most` groups of neighbours, of nearly equal size."""
    groups = min(x.size, most)
    if groups == 0:
        return Points(x, y, y, y)
    starts = np.arange(groups) * x.size // groups
    sizes = np.diff(starts, append=x.size)
    return Points(
        np.add.reduceat(x, starts) / sizes,
        np.add.reduceat(y, starts) / sizes,
        np.minimum.reduceat(y, starts),
        np.maximum.reduceat(y, starts),
    )


def smooth(values: Column) -> Column:
    """Return the mean of `SMOOTHED_SHARE` of all values around each; at the ends, of those that there are."""
    reach = round(values.size * SMOOTHED_SHARE / 2)
    sums = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(values.size)
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, values.size)
    return (sums[high] - sums[low]) / (high - low)


def finite(x: Column, y: Column) -> tuple[Column, Column]:
    """Return `x` and `y` where both are finite."""
    there = np.isfinite(x) & np.isfinite(y)
    return x[there], y[there]


def loss(steps: Column, losses: Column, held_out_steps: Column, held_out_losses: Column) -> str:
    """Draw the loss of the updates, with its spread, and of the held-out rows, which may be none."""
    axes = new_axes()
    limits = _smooth_over_raw(axes, *finite(steps, losses), "loss", smooth)
    _line(axes, held_out_steps, held_out_losses, "held-out", zorder=4)
    limit(axes, *limits, *held_out_losses)
    return svg(axes, "loss", "loss over the steps")


def images_per_second(steps: Column, rates: Column) -> str:
    """Draw the speed of all workers together; the smooth curve is that of the images over the time they took."""
    axes, known = new_axes(), rates > 0
    x, y = finite(steps[known], rates[known])
    limits = _smooth_over_raw(axes, x, y, "speed", lambda y: 1 / smooth(1 / y))
    limit(axes, 0.0, *limits)
    return svg(axes, "speed", "images per second over the steps")


def learning_rate(steps: Column, rates: Column) -> str:
    """Draw the learning rate."""
    axes = new_axes()
    x, y, *_ = thin(*finite(steps, rates))
    _line(axes, x, y, "lr")
    limit(axes, 0.0, *y)
    return svg(axes, "lr", "learning rate over the steps")


def control_gap(steps: Column, gaps: Column, errors: Column, appeared_at: int | None, least: float) -> str:
    """Draw the control gap with its standard errors, and a dashed line where control has appeared.

    Args:
        errors: standard error of each gap.
        least: gap from which on it may show control; smaller ones do not fill the chart.
    """
    axes = new_axes()
    low, high = gaps - STANDARD_ERRORS * errors, gaps + STANDARD_ERRORS * errors
    axes.axhline(0, color=PAINTS["ink"], linewidth=0.8)
    if steps.size == 1:
        axes.vlines(steps, low, high, color=PAINTS["gap"], alpha=0.4, linewidth=4)
    axes.fill_between(steps, low, high, color=PAINTS["gap"], alpha=0.25, linewidth=0)
    _line(axes, steps, gaps, "gap")
    if appeared_at is not None:
        axes.axvline(appeared_at, color=PAINTS["gap"], linewidth=1.5, linestyle=(0, (4, 3)))
    limit(axes, 0.0, *low, *high, least)
    return svg(axes, "gap", "control gap over the steps")


def control_fidelity(steps: Column, means: Column, errors: Column) -> str:
    """Draw the control fidelity with its standard errors, which are nan for a single image."""
    axes = new_axes()
    reach = STANDARD_ERRORS * np.nan_to_num(errors)
    axes.fill_between(steps, means - reach, means + reach, color=PAINTS["fidelity"], alpha=0.25, linewidth=0)
    _line(axes, steps, means, "fidelity")
    limit(axes, 0.0, *(means + reach))
    return svg(axes, "fidelity", "control fidelity over the steps")


def new_axes(label: str = "step", size: tuple[float, float] = SIZE) -> Axes:
    """Return empty axes on a new figure; `label` names the horizontal one."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with own_style():
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        axes.set_xlabel(label, color=PAINTS["ink"], size=12)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(PAINTS["grid"])
    axes.grid(axis="y", color=PAINTS["grid"], linewidth=0.8)
    axes.tick_params(colors=PAINTS["ink"], labelsize=12, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, *axes.get_xlim())))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value, *axes.get_ylim())))
    axes.margins(x=0.02)
    return axes


def own_style() -> AbstractContextManager[None]:
    """Use matplotlib's default style, not the user's (such as LaTeX), and keep letters as letters, dollars too."""
    import matplotlib.style

    return matplotlib.style.context(["default", {"svg.fonttype": "none", "text.parse_math": False}])


def digits(low: float, high: float, least: int = 4) -> int:
    """Return the digits, at least `least`, that tell a few numbers between `low` and `high` apart."""
    step = abs(high - low) / 5
    return max(least, 1 + math.ceil(math.log10(max(abs(low), abs(high)) / step))) if differ(low, high) else least


def differ(low: float, high: float) -> bool:
    """Check that two numbers differ by more than the precision of 32 bits."""
    return abs(high - low) > PRECISION * max(abs(low), abs(high))


def tick(value: float, low: float, high: float, least: int = 4) -> str:
    """Return the label of an axis from `low` to `high` at `value`; 0 for what arithmetic leaves there."""
    return "0" if abs(value) < 1e-6 * abs(high - low) else short_number(value, digits(low, high, least))


def _smooth_over_raw(
    axes: Axes, x: Column, y: Column, paint: str, smoothing: Callable[[Column], Column]
) -> list[float]:
    """Draw the updates pale and their mean strong; return the values to show, without rare outliers."""
    if not x.size:
        return []
    raw, smoothed = thin(x, y), thin(x, smoothing(y))
    if x.size > MOST_POINTS:
        axes.fill_between(raw.x, raw.low, raw.high, color=PAINTS[paint], alpha=0.2, linewidth=0)
    else:
        axes.plot(raw.x, raw.mean, color=PAINTS[paint], alpha=0.35, linewidth=1)
    _line(axes, smoothed.x, smoothed.mean, paint, marked=x.size == 1)
    return [*np.percentile(y, [1, 99]), smoothed.mean.min(), smoothed.mean.max()]


def _line(axes: Axes, x: Column, y: Column, paint: str, *, marked: bool | None = None, zorder: float = 3) -> None:
    if marked is None:
        marked = x.size <= MARKED_POINTS
    axes.plot(x, y, color=PAINTS[paint], linewidth=2.2, marker="o" if marked else "", markersize=4.5, zorder=zorder)


def limit(axes: Axes, *values: float) -> None:
    """Make the vertical axis hold `values`, and a little more."""
    if not values:
        return
    low, high = float(min(values)), float(max(values))
    margin = 0.06 * (high - low) if differ(low, high) else 0.1 * abs(high) or 1.0
    axes.set_ylim(low if low == 0 else low - margin, high + margin)


def svg(axes: Axes, name: str, title: str, paints: Mapping[str, str] = PAINTS) -> str:
    """Return the figure of `axes` as an `<svg>`; `name` keeps its ids apart from those of the page's other figures.

    Args:
        paints: see `stand_ins`.
    """
    with StringIO() as file, own_style():
        figure: Any = axes.figure
        figure.savefig(file, format="svg")
        drawn = file.getvalue()
    box = re.search(r'viewBox="([^"]+)"', drawn)
    assert box is not None
    body = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|<defs>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), body)
    body = re.sub(r"\s*\n\s*", " ", body)
    ids = {found: f"{name}-{i}" for i, found in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', body)))}
    body = re.sub(r'(\bid="|url\(#|href="#)([^")]+)', lambda link: link[1] + ids[link[2]], body)
    for variable, colour in paints.items():
        body = body.replace(colour, f"var(--{variable})")
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{escape(title)}">{body}'
