"""The leaderboard of a sweep: leaderboard.csv for spreadsheets and pandas, and a short table for the terminal."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from raycontrolnet.storage import checkpoint
from raycontrolnet.storage.files import replacing
from raycontrolnet.text import printable
from raycontrolnet.tune.records import TRIALS, Trial, ranked, settings_of
from raycontrolnet.tune.table import Column, LiveState, columns_of, lay_out

LEADERBOARD_FILE = "leaderboard.csv"
SETTING = "setting:"
"""Prefix of the names of swept settings."""
FIGURES = (
    "val_loss",
    "val_loss_shuffled",
    "control_gap",
    "control_appeared_at_step",
    "control_fidelity",
    "loss",
    "images_per_second",
)
FORMULA_SIGNS = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n")
"""A spreadsheet takes a text with such a beginning for a formula."""


def write_leaderboard(sweep_dir: Path, trials: Sequence[Trial], objective: str) -> Path:
    """Write leaderboard.csv, whole or not at all: a row per trial, in the order of `records.ranked`.

    Numbers are written in full, settings as in trial.json; unknown values are empty. A text that a spreadsheet would
    take for a formula gets an apostrophe in front.
    """
    settings = settings_of(trials)
    figures = list(dict.fromkeys((objective, *FIGURES)))
    names = ["rank", "trial", "state", "stopped_at", "step", *figures, "seconds", "checkpoint"]
    path = sweep_dir / LEADERBOARD_FILE
    with (
        replacing(path) as partial,
        partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*names, *(SETTING + printable(name) for name in settings), "cause"])
        for rank, trial in enumerate(ranked(trials, objective), start=1):
            known = {**_row(trial), "rank": rank}
            values = [_value(trial.record.settings[name]) if name in trial.record.settings else "" for name in settings]
            cause = "" if trial.record.cause is None else _text(printable(trial.record.cause))
            writer.writerow(["" if known.get(n) is None else _value(known[n]) for n in names] + [*values, cause])
    return path


def leaderboard_lines(
    trials: Sequence[Trial], objective: str, most: int = 10, *, width: int | None = None
) -> list[str]:
    """Return the best `most` trials as a table of text, at most `width` wide."""
    if not trials:
        return ["no trials"]
    best = ranked(trials, objective)[:most]
    columns = columns_of(best, objective)
    cells = [
        [str(rank), *(column.cell(trial, LiveState()) for column in columns)] for rank, trial in enumerate(best, 1)
    ]
    lines = lay_out([Column(("rank", "rank", "#"), lambda *_: "", 4), *columns], cells, width)
    return lines if len(trials) <= most else [*lines, f"... and {len(trials) - most} more in {LEADERBOARD_FILE}"]


def _row(trial: Trial) -> dict[str, Any]:
    """Return the known values of a trial, by column."""
    record = trial.record
    return {
        **trial.last,
        "trial": record.name,
        "state": record.state,
        "stopped_at": record.stopped_at,
        "step": trial.step,
        "control_appeared_at_step": trial.control_since,
        "seconds": record.seconds,
        "checkpoint": _checkpoint(trial),
    }


def _checkpoint(trial: Trial) -> str | None:
    """Return the run's last complete checkpoint, relative to the sweep's folder."""
    with suppress(OSError):  # it was just deleted: there is a newer one
        if found := checkpoint.latest(trial.folder):
            return f"{TRIALS}/{trial.record.name}/{found.path.name}"
    return None


def _value(value: Any) -> str:
    """Return a number in full, a text as it is but for formulas, and anything else as JSON."""
    return _text(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _text(text: str) -> str:
    return "'" + text if text.lstrip(" ").startswith(FORMULA_SIGNS) else text
