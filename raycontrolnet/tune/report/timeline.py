"""When the trials of a sweep ran: a bar each on one time scale, as HTML that a phone lays out by its own width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from raycontrolnet.report.page import time
from raycontrolnet.tune.records import Trial
from raycontrolnet.tune.report.history import SweepHistory

LONGEST_PAUSE = 0.1
"""A time in which nothing ran is cut out if it is longer than this share of the time in which something did."""
MARKS_S = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400, 172800, 604800)
MOST_MARKS = 5


class Span(NamedTuple):
    """When a trial ran, in seconds of the scale."""

    trial: Trial
    start: float
    end: float


def timeline(swept: SweepHistory) -> Iterable[str]:
    """A list of bars, in the order of their starts; nothing if no start is known."""
    spans, cut = without_pauses(_spans(swept))
    if not spans:
        return
    whole = max(span.end for span in spans) or 1.0
    marks = "".join(f'<b style="left: {100 * at / whole:.2f}%">{_clock(at)}</b>' for at in _marks(whole))
    yield f'<ul class="timeline">\n<li class="scale"><span></span><span class="track">{marks}</span></li>'
    for trial, start, end in spans:
        name, state = trial.record.name, trial.record.state
        place = f"left: {100 * start / whole:.2f}%; width: {100 * (end - start) / whole:.2f}%"
        yield (
            f'<li><a href="#trial-{name}">{name}</a>'
            f'<span class="track"><i class="{state}" style="{place}" title="{time(end - start)}"></i></span>'
            f"<small>{_ending(trial)}</small></li>"
        )
    yield "</ul>"
    if cut:
        yield f'<p class="pale">Pauses of the sweep are cut out: {time(cut)} in which no trial ran.</p>'


def _ending(trial: Trial) -> str:
    """Its state, and the step that it reached."""
    record, step = trial.record, trial.step
    if step is None or record.state == "finished":
        return record.state
    return f"{record.state} {'after' if record.state == 'failed' else 'at'} {step:,}"


def _marks(whole: float) -> list[float]:
    """Round times up to `whole` seconds."""
    unit = next((unit for unit in MARKS_S if whole / unit <= MOST_MARKS), whole)
    return [unit * i for i in range(int(whole / unit) + 1)]


def _clock(seconds: float) -> str:
    """5400 -> 1:30 h."""
    if not seconds:
        return "0"
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02} h" if minutes else f"{hours} h"
    return (f"{minutes}:{secs:02} min" if secs else f"{minutes} min") if minutes else f"{secs} s"


def without_pauses(spans: Sequence[Span]) -> tuple[list[Span], float]:
    """`spans` from 0 on, less the times in which nothing ran, and how long those were together."""
    ordered = sorted(spans, key=lambda span: (span.start, span.trial.record.index))
    busy = _busy([(span.start, span.end) for span in ordered])
    longest = LONGEST_PAUSE * sum(end - start for start, end in busy)
    pauses = [(end, start) for (_, end), (start, _) in pairwise(busy) if start - end > longest]
    first = busy[0][0] if busy else 0.0
    moved = []
    for trial, start, end in ordered:
        back = first + sum(till - since for since, till in pauses if till <= start)
        moved.append(Span(trial, start - back, end - back))
    return moved, sum(till - since for since, till in pauses)


def _busy(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The times in which at least one ran, ascending; `spans` by their starts."""
    busy: list[tuple[float, float]] = []
    for start, end in spans:
        if busy and start <= busy[-1][1]:
            busy[-1] = (busy[-1][0], max(busy[-1][1], end))
        else:
            busy.append((start, end))
    return busy


def _spans(swept: SweepHistory) -> list[Span]:
    """In unix seconds; a trial that runs goes on till now, as far as the sweep's files know it."""
    now = swept.seconds("started") + swept.seconds("seconds")
    spans = []
    for trial in swept.trials:
        record = trial.record
        if record.started is None:
            continue
        end = record.started + record.seconds
        if record.state == "running" and swept.state == "running" and math.isfinite(now):
            end = max(end, now)
        spans.append(Span(trial, record.started, end))
    return spans
