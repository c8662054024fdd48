"""The trials of a sweep as a table of text that fits a width."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.text import Text

from raycontrolnet.text import decimals, duration, first_of, printable, short_exponent, short_number
from raycontrolnet.tune.records import Trial, as_text, settings_of

GAP = "  "
"""Between columns."""
UNKNOWN = "-"
CONTROL = "*"
"""Marks a control gap that shows that the model obeys the control image."""
LONGEST = (24, 12, 8)
"""Widths of a setting in the table; the shorter ones are tried before columns are left out."""
FORMATS: dict[str, Callable[[float], str]] = {
    "control_gap": partial(short_number, digits=2),
    "control_fidelity": partial(decimals, places=3),
    "images_per_second": partial(short_number, digits=3),
}
"""Formats of the figures that are not shown with four decimals."""
FIGURES = ("val_loss", "loss", "control_gap")
"""Figures besides the objective."""
HEADINGS = {"control_gap": f"gap ({CONTROL} control)"}


class LiveState(NamedTuple):
    """The state of a trial between its reports."""

    step: int | None = None
    loss: float | None = None
    """Mean of the last updates."""
    seconds: float | None = None
    """Time since its start."""


def figure(name: str, value: float | None) -> str:
    """Return a short number; `UNKNOWN` for nan and None."""
    return UNKNOWN if value is None or math.isnan(value) else FORMATS.get(name, decimals)(value)


def setting(value: Any) -> str:
    """Return a setting's value in short: 1e-5, cosine, true, null, [1, 2]."""
    if isinstance(value, float):
        return short_exponent(f"{value:.3g}")
    return printable(as_text(value))


def column(name: str) -> str:
    """Return the column of a setting: its name, or its flag if a figure has that name."""
    return f"--{name}" if name in FIGURES else name


def trial_table(
    trials: Sequence[Trial],
    objective: str,
    now: Mapping[int, LiveState],
    total_steps: int | None = None,
    width: int | None = None,
) -> list[Text]:
    """Return the headings, and a line per trial, at most `width` wide.

    If there is too little room, settings and their names are cut, then columns are left out.

    Args:
        trials: at least one, in the order of the lines.
        now: index of a trial -> where it is between its reports.
        total_steps: updates of a trial, unless its own settings name max_train_steps.
    """
    names = settings_of(trials)
    rows = [_row(trial, now.get(trial.record.index, LiveState()), names, objective, total_steps) for trial in trials]
    settings = [column(name) for name in names]
    columns = {name: [printable(HEADINGS.get(name, name)), *(row[name] for row in rows)] for name in rows[0]}
    others = ["loss", "time", "val_loss", *reversed(settings), "control_gap", "step", "state"]
    left_out = [name for name in others if name != objective] + [objective]
    widths = _fit(columns, settings, left_out, width)
    lines = []
    for index in range(len(trials) + 1):
        cells = [Text(columns[name][index], overflow="ellipsis") for name in widths]
        for name, cell in zip(widths, cells, strict=True):
            cell.align("left" if name in ("trial", "state", *settings) else "right", widths[name])
        line = Text(GAP).join(cells)
        line.rstrip()
        if width is not None:
            line.truncate(width, overflow="ellipsis")
        lines.append(line)
    return lines


def repeated(trials: Sequence[Trial]) -> Iterator[str]:
    """Yield a line for all trials that share their settings, and so train the same."""
    names: dict[str, list[str]] = {}
    for trial in trials:
        names.setdefault(json.dumps(trial.record.settings, sort_keys=True), []).append(trial.record.name)
    for same in names.values():
        if len(same) > 1:
            yield f"trials {first_of(sorted(same))} have the same settings, and so train the same"


def _fit(
    columns: dict[str, list[str]], settings: Sequence[str], left_out: Sequence[str], width: int | None
) -> dict[str, int]:
    """Return the widths of the columns that have room; shorten their headings if there is too little."""
    widths = _widths(columns, settings)
    if width is None or _total(widths) <= width:
        return widths
    columns["control_gap"][0] = "gap"
    for longest in LONGEST:
        if _total(widths := _widths(columns, settings, longest)) <= width:
            return widths
    for name, initials in _initials(settings).items():
        columns[name][0] = initials
    widths = _widths(columns, settings, longest)
    for name in left_out:
        if _total(widths) > width:
            del widths[name]
    return widths


def _widths(columns: Mapping[str, list[str]], settings: Sequence[str], longest: int | None = None) -> dict[str, int]:
    """Return the width of each column; settings are at most `longest` wide, if their headings stay different."""
    widths = {name: max(map(cell_len, cells)) for name, cells in columns.items()}
    if longest is None:
        return widths
    cut = [columns[name][0][: longest - 1] for name in settings]
    return widths | {
        name: min(widths[name], longest if cut.count(start) == 1 else max(longest, cell_len(columns[name][0])))
        for name, start in zip(settings, cut, strict=True)
    }


def _initials(settings: Sequence[str]) -> dict[str, str]:
    """Return the settings whose initials are theirs alone, such as learning_rate -> lr."""
    found = {name: "".join(word[:1] for word in name.split("_")) for name in settings if "_" in name.strip("_")}
    taken = [*found.values(), *settings]
    return {name: initials for name, initials in found.items() if taken.count(initials) == 1}


def _total(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + len(GAP) * (len(widths) - 1)


def _row(
    trial: Trial, now: LiveState, settings: Sequence[str], objective: str, total_steps: int | None
) -> dict[str, str]:
    """Return the cells of a trial, by column."""
    record = trial.record
    step = trial.step if now.step is None or record.stopped_at is not None else now.step
    total = record.settings.get("max_train_steps") or total_steps
    seconds = now.seconds if now.seconds is not None else (record.seconds or None)
    figures = {name: trial.last.get(name) for name in (objective, *FIGURES)}
    if now.loss is not None:
        figures["loss"] = now.loss
    shown = {name: figure(name, value) for name, value in figures.items()}
    shown["control_gap"] += " " if trial.control_since is None else CONTROL
    return {
        "trial": record.name,
        "state": record.state,
        **{column(name): setting(record.settings[name]) if name in record.settings else UNKNOWN for name in settings},
        "step": UNKNOWN if step is None else f"{step}/{total}" if total else str(step),
        **shown,
        "time": UNKNOWN if seconds is None else duration(seconds),
    }
