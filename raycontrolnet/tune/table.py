"""Trials as a table of text that fits a width, for the live table and the leaderboard."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from rich.cells import cell_len, set_cell_size

from raycontrolnet.text import duration, printable
from raycontrolnet.tune.records import Trial, settings_of

GAP = "  "
"""Between columns."""
CUT = ".."
"""Replaces what was cut off."""
UNKNOWN = "-"
CONTROL = "*"
"""Marks a control gap that shows that the model obeys the control image."""
LONGEST_TEXTS = (24, 12, 8)
"""Widths of a text in the table; the shorter ones are tried before columns are left out."""
FORMATS = {"control_gap": ".2g", "control_fidelity": ".3f", "images_per_second": ".3g"}
"""Formats of the figures that are not shown with four decimals."""
FIGURE_NAMES = {
    "val_loss": ("val_loss", "val"),
    "control_gap": (f"gap ({CONTROL} control)", "gap"),
    "control_fidelity": ("control_fidelity", "fidelity"),
    "images_per_second": ("images_per_second", "images/s"),
}


class LiveState(NamedTuple):
    """The state of a trial between its reports."""

    step: int | None = None
    loss: float | None = None
    """Mean of the last updates."""
    seconds: float | None = None
    """Time since its start."""


class Column(NamedTuple):
    """A column of the table."""

    names: Sequence[str]
    """Its names, the longest first."""
    cell: Callable[[Trial, LiveState], str]
    left_out: int
    """The column with the largest number is the first to go where there is no room; 0: never."""
    text: bool = False
    """Align to the left, and cut if it is long."""


def columns_of(trials: Sequence[Trial], objective: str, total_steps: int | None = None) -> list[Column]:
    """Return trial, state, the swept settings, step, the objective, other figures and time."""
    figures = dict.fromkeys((objective, "val_loss", "loss", "control_gap"))
    ranks = {"loss": 1003, "val_loss": 1001, "control_gap": 4}
    return [
        Column(("trial",), lambda trial, _: trial.record.name, 0, text=True),
        Column(("state",), lambda trial, _: trial.record.state, 2, text=True),
        *(
            Column(names, _setting_cell(name), 5 + place, text=True)
            for place, (name, names) in enumerate(shorter_names(settings_of(trials)).items())
        ),
        Column(("step",), lambda trial, now: _step_cell(trial, now, total_steps), 3),
        *(
            Column(FIGURE_NAMES.get(name, (name,)), _figure_cell(name), 1 if name == objective else ranks[name])
            for name in figures
        ),
        Column(("time",), _time_cell, 1002),
    ]


def figure(name: str, value: float | None) -> str:
    """Return a short number; `UNKNOWN` for nan and None."""
    return UNKNOWN if value is None or math.isnan(value) else f"{value:{FORMATS.get(name, '.4f')}}"


def setting(value: Any) -> str:
    """Return a setting's value in short: 1e-5, cosine, true, null, [1, 2]."""
    if isinstance(value, float):
        return re.sub(r"e([+-])0*", r"e\1", f"{value:.3g}").replace("e+", "e")
    return printable(value if isinstance(value, str) else json.dumps(value, default=str))


def settings_in_words(settings: Mapping[str, Any]) -> str:
    """Return `learning_rate 1e-5, seed 3`."""
    return ", ".join(f"{printable(name)} {setting(value)}" for name, value in settings.items())


def shorter_names(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return learning_rate -> learning_rate, lear_rate, lr; a short name that two would share is not used."""
    levels = [
        list(names),
        ["_".join(word[:4] for word in name.split("_")) for name in names],
        ["".join(word[:1] for word in name.split("_")) if "_" in name.strip("_") else name[:4] for name in names],
    ]
    for before, level in pairwise(levels):
        shared = {name for name in level if level.count(name) > 1}
        level[:] = [longer if name in shared else name for longer, name in zip(before, level, strict=True)]
    return {name: tuple(map(printable, shorter)) for name, *shorter in zip(names, *levels, strict=True)}


def lay_out(columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Return the names of the columns, and a line per row of `cells`, at most `width` wide.

    If there is too little room, columns are shortened, one step at a time where it helps most, and at last left out.
    """
    levels = [_levels(column, [row[index] for row in cells]) for index, column in enumerate(columns)]
    if width is None:
        return _joined(columns, [texts for texts, *_ in levels])
    kept = list(range(len(columns)))
    while sum(_width(levels[index][0]) for index in kept) + len(GAP) * (len(kept) - 1) > width:
        saved = {i: _width(levels[i][0]) - _width(levels[i][1]) for i in kept if len(levels[i]) > 1}
        if saved:
            del levels[max(saved, key=lambda index: saved[index])][0]
            continue
        doomed = max(kept, key=lambda index: columns[index].left_out)
        if columns[doomed].left_out == 0:
            break
        kept.remove(doomed)
    lines = _joined([columns[index] for index in kept], [levels[index][0] for index in kept])
    return [clip(line, width) for line in lines]


def _levels(column: Column, cells: Sequence[str]) -> list[list[str]]:
    """Return the texts of a column, its name first: in full, then ever shorter."""
    found: list[list[str]] = []
    for level, longest in enumerate(LONGEST_TEXTS):
        name = column.names[min(level, len(column.names) - 1)]
        texts = [name, *(clip(cell, longest) if column.text else cell for cell in cells)]
        if not found or _width(texts) < _width(found[-1]):
            found.append(texts)
    return found


def _width(texts: Sequence[str]) -> int:
    return max(map(cell_len, texts))


def _joined(columns: Sequence[Column], shown: Sequence[Sequence[str]]) -> list[str]:
    padded = []
    for column, texts in zip(columns, shown, strict=True):
        spaces = [" " * (_width(texts) - cell_len(text)) for text in texts]
        padded.append([t + s if column.text else s + t for t, s in zip(texts, spaces, strict=True)])
    return [GAP.join(row).rstrip() for row in zip(*padded, strict=True)]


def clip(text: str, width: int) -> str:
    """Return `text`, cut off if it is wider than `width`."""
    if cell_len(text) <= width:
        return text
    return (set_cell_size(text, max(width - len(CUT), 0)).rstrip() + CUT)[: max(width, 0)]


def _setting_cell(name: str) -> Callable[[Trial, LiveState], str]:
    return lambda trial, _: setting(trial.record.settings[name]) if name in trial.record.settings else UNKNOWN


def _figure_cell(name: str) -> Callable[[Trial, LiveState], str]:
    def cell(trial: Trial, now: LiveState) -> str:
        value = now.loss if name == "loss" and now.loss is not None else trial.last.get(name)
        shown = figure(name, value)
        if name != "control_gap":
            return shown
        return shown + (CONTROL if trial.control_since is not None else " ")

    return cell


def _step_cell(trial: Trial, now: LiveState, total_steps: int | None) -> str:
    step = trial.step if now.step is None or trial.record.stopped_at is not None else now.step
    total = trial.record.settings.get("max_train_steps") or total_steps
    return UNKNOWN if step is None else f"{step}/{total}" if total else str(step)


def _time_cell(trial: Trial, now: LiveState) -> str:
    seconds = trial.record.seconds if now.seconds is None else now.seconds
    return duration(seconds) if seconds or now.seconds is not None else UNKNOWN
