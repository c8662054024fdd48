"""The trials of a sweep as a table of text that fits a width."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.text import Text

from raycontrolnet.text import duration, printable
from raycontrolnet.tune.records import Trial, as_text, settings_of

GAP = "  "
"""Between columns."""
UNKNOWN = "-"
CONTROL = "*"
"""Marks a control gap that shows that the model obeys the control image."""
LONGEST = (24, 12, 8)
"""Widths of a heading or a setting in the table; the shorter ones are tried before columns are left out."""
FORMATS = {"control_gap": ".2g", "control_fidelity": ".3f", "images_per_second": ".3g"}
"""Formats of the figures that are not shown with four decimals."""
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
    return UNKNOWN if value is None or math.isnan(value) else f"{value:{FORMATS.get(name, '.4f')}}"


def setting(value: Any) -> str:
    """Return a setting's value in short: 1e-5, cosine, true, null, [1, 2]."""
    if isinstance(value, float):
        return re.sub(r"e([+-])0*", r"e\1", f"{value:.3g}").replace("e+", "e")
    return printable(as_text(value))


def trial_table(
    trials: Sequence[Trial],
    objective: str,
    now: Mapping[int, LiveState],
    total_steps: int | None = None,
    width: int | None = None,
) -> list[Text]:
    """Return the headings, and a line per trial, at most `width` wide.

    If there is too little room, headings and settings are cut, and then columns are left out.

    Args:
        trials: at least one, in the order of the lines.
        now: index of a trial -> where it is between its reports.
        total_steps: updates of a trial, unless its own settings name max_train_steps.
    """
    settings = settings_of(trials)
    rows = [_row(trial, now.get(trial.record.index, LiveState()), settings, objective, total_steps) for trial in trials]
    columns = {name: [printable(HEADINGS.get(name, name)), *(row[name] for row in rows)] for name in rows[0]}
    widths = {name: max(map(cell_len, cells)) for name, cells in columns.items()}
    if width is not None:
        least = {name: max(map(cell_len, cells[1:])) for name, cells in columns.items() if name not in settings}
        others = ["loss", "time", "val_loss", *reversed(settings), "control_gap", "step", "state"]
        left_out = [name for name in others if name != objective] + [objective]
        widths = _fit(widths, least, left_out, width)
    lines = []
    for index in range(len(trials) + 1):
        cells = [Text(columns[name][index], overflow="ellipsis") for name in widths]
        for name, cell in zip(widths, cells, strict=True):
            cell.align("left" if name in ("trial", "state", *settings) else "right", widths[name])
        line = Text(GAP).join(cells)
        line.rstrip()
        line.truncate(line.cell_len if width is None else width, overflow="ellipsis")
        lines.append(line)
    return lines


def _fit(widths: dict[str, int], least: Mapping[str, int], left_out: Sequence[str], width: int) -> dict[str, int]:
    """Return the widths of the columns that have room."""
    found = widths
    for longest in LONGEST:
        found = {name: max(min(wanted, longest), least.get(name, 0)) for name, wanted in widths.items()}
        if _total(found) <= width:
            return found
    for name in left_out:
        if _total(found) > width:
            del found[name]
    return found


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
    figures = {name: trial.last.get(name) for name in (objective, "val_loss", "loss", "control_gap")}
    if now.loss is not None:
        figures["loss"] = now.loss
    shown = {name: figure(name, value) for name, value in figures.items()}
    shown["control_gap"] += " " if trial.control_since is None else CONTROL
    return {
        "trial": record.name,
        "state": record.state,
        **{name: setting(record.settings[name]) if name in record.settings else UNKNOWN for name in settings},
        "step": UNKNOWN if step is None else f"{step}/{total}" if total else str(step),
        **shown,
        "time": UNKNOWN if seconds is None else duration(seconds),
    }
