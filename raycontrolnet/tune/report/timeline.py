"""The times in which the trials of a sweep ran, as bars on one scale."""

from __future__ import annotations

import math
from typing import NamedTuple

from raycontrolnet.tune.records import Trial
from raycontrolnet.tune.report.history import SweepHistory

LONGEST_PAUSE = 0.1
"""A pause of the sweep is cut out if it is longer than this share of the time in which trials ran."""
MARKS_S = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400, 172800, 604800)
MOST_MARKS = 5


class Timeline(NamedTuple):
    """Bars in the order of their starts; times in seconds since the first, without pauses."""

    bars: list[tuple[Trial, float, float]]
    """Trial, start and end."""
    whole: float
    marks: list[float]
    cut: float
    """Length of the pauses that are cut out."""


def timeline(history: SweepHistory) -> Timeline | None:
    """Return when the trials ran; None if no start is known."""
    spans = sorted(_spans(history), key=lambda span: (span[1], span[0].record.index))
    if not spans:
        return None
    busy, until = 0.0, -math.inf
    for _, start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    first = until = spans[0][1]
    cut, bars = 0.0, []
    for trial, start, end in spans:
        cut += start - until if start - until > LONGEST_PAUSE * busy else 0.0
        until = max(until, end)
        bars.append((trial, start - first - cut, end - first - cut))
    whole = max(end for *_, end in bars) or 1.0
    unit = next((unit for unit in MARKS_S if whole / unit <= MOST_MARKS), whole)
    return Timeline(bars, whole, [unit * i for i in range(int(whole / unit) + 1)], cut)


def _spans(history: SweepHistory) -> list[tuple[Trial, float, float]]:
    """Return trial, start and end in unix seconds; a running trial ends now, as far as the sweep's files know."""
    now = history.seconds("started") + history.seconds("seconds")
    spans = []
    for trial in history.trials:
        if (start := trial.record.started) is not None:
            end = start + trial.record.seconds
            runs = trial.record.state == "running" and history.state == "running" and math.isfinite(now)
            spans.append((trial, start, max(end, now) if runs else end))
    return spans
