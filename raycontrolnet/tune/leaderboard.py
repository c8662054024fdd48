"""The leaderboard of a sweep: leaderboard.csv for spreadsheets and pandas."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from raycontrolnet.storage.files import replacing
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.text import printable
from raycontrolnet.tune.records import TRIALS_FOLDER, Trial, as_text, ranked, run_folder_of, settings_of

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


def write_leaderboard(
    sweep_dir: Path, trials: Sequence[Trial], objective: str, folder: RunFolder | None = None
) -> Path:
    """Write leaderboard.csv, whole or not at all: a row per trial, in the order of `records.ranked`.

    Numbers are written in full, settings as in trial.json; unknown values are empty. A text that a spreadsheet would
    take for a formula gets an apostrophe in front.

    Args:
        folder: the sweep's folder, if it is in an object store.
    """
    sweep = folder or RunFolder(str(sweep_dir))
    settings = [SETTING + printable(name) for name in settings_of(trials)]
    figures = dict.fromkeys((objective, *FIGURES))
    names = ["rank", "trial", "state", "stopped_at", "step", *figures, "seconds", "checkpoint", *settings, "cause"]
    path = sweep_dir / LEADERBOARD_FILE
    with (
        replacing(path) as partial,
        partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        writer = csv.DictWriter(file, names, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for rank, trial in enumerate(ranked(trials, objective), start=1):
            writer.writerow({"rank": rank, **_row(sweep, trial)})
    return path


def _row(sweep: RunFolder, trial: Trial) -> dict[str, str]:
    """Return the known values of a trial, by column."""
    record = trial.record
    known = {
        **trial.last,
        "trial": record.name,
        "state": record.state,
        "stopped_at": record.stopped_at,
        "step": trial.step,
        "control_appeared_at_step": trial.control_since,
        "seconds": record.seconds,
        "checkpoint": _checkpoint(sweep, trial),
        "cause": None if record.cause is None else printable(record.cause),
    }
    settings = {SETTING + printable(name): _value(value) for name, value in record.settings.items()}
    return {name: _value(value) for name, value in known.items() if value is not None} | settings


def _checkpoint(sweep: RunFolder, trial: Trial) -> str | None:
    """Return the run's last complete checkpoint, relative to the sweep's folder."""
    with suppress(OSError):  # it was just deleted: there is a newer one
        if found := run_folder_of(sweep, trial.record).latest():
            return f"{TRIALS_FOLDER}/{trial.record.name}/{found.path.name}"
    return None


def _value(value: Any) -> str:
    """Return a number in full, a text as it is but for formulas, and anything else as JSON."""
    if isinstance(value, str) and value.lstrip(" ").startswith(FORMULA_SIGNS):
        return "'" + value
    return as_text(value)
