"""The records in the folder of a run, in any state of the run: a missing or half-written file counts as empty."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from raycontrolnet.report.curves import Column
from raycontrolnet.sampling.find_controlnet import CONFIG_FILE
from raycontrolnet.sampling.scores import Fidelity
from raycontrolnet.storage.files import read_json
from raycontrolnet.training import held_out, metrics, validation
from raycontrolnet.training.status import read_status
from raycontrolnet.training.timings import TIMINGS_FILE

UPDATE_COLUMNS = ("step", "loss", "lr", "samples", "images_per_second", "time")
MEASUREMENT = ("step", "val_loss", "val_loss_shuffled", "control_gap", "control_gap_error")
"""Numbers that a line of validation.jsonl must have to count."""

RECENT_UPDATES = 100
"""Updates by which the time left is estimated."""
UPDATES_FOR_SPEED = 4
"""Timed updates below which no speed is known."""


@dataclass(frozen=True)
class RunHistory:
    """The records of one run; what is not there yet is empty."""

    status: Mapping[str, Any]
    """run.json."""
    settings: Mapping[str, Any]
    """config.yaml."""
    seconds_by_phase: Mapping[str, float]
    """Seconds of the worker of rank 0."""
    updates: Mapping[str, Column]
    """metrics.jsonl by column: float64, a value per update, steps ascending; nan where there is no number."""
    held_out: Sequence[dict[str, Any]]
    """validation.jsonl: a measurement per record, steps ascending."""
    fidelity: Mapping[int, Fidelity] = field(default_factory=dict)
    """Step -> control fidelity of the validation images drawn at it; steps ascending."""

    @property
    def state(self) -> str:
        """State of the run: running, finished, failed, interrupted; unknown without run.json."""
        return str(self.status.get("status", "unknown"))

    @property
    def step(self) -> int:
        """Updates done, including those of earlier parts of the run."""
        done = number(self.status.get("step"))
        return int(done) if math.isfinite(done) else self.last_update

    @property
    def last_update(self) -> int:
        """Last update in metrics.jsonl; 0 if there is none."""
        return int(self.updates["step"][-1]) if self.updates["step"].size else 0

    @property
    def last_step(self) -> int | None:
        """Last step of this run, if known: images of later steps are from an earlier run in this folder."""
        return self.step if self.updates["step"].size else None

    @property
    def total_updates(self) -> int | None:
        """Updates of the whole run, if known."""
        total = number(self.status.get("total_updates", self.settings.get("max_train_steps")))
        return int(total) if 1 <= total < math.inf else None

    @property
    def last_sign_s(self) -> float | None:
        """Time of the last sign of the run, in unix seconds."""
        started, seconds = number(self.status.get("started")), number(self.status.get("seconds"))
        known = [time for time in (started + seconds, started, *self.updates["time"][-1:]) if math.isfinite(time)]
        return max(known, default=None)

    @property
    def seconds(self) -> float | None:
        """Time that the run, or its part that was started last, has taken so far."""
        started = number(self.status.get("started"))
        return None if self.last_sign_s is None or math.isnan(started) else self.last_sign_s - started

    @property
    def seconds_left(self) -> float | None:
        """Time until the last update, while the run goes on."""
        if self.state != "running" or self.total_updates is None:
            return None
        times, steps = self.updates["time"][-RECENT_UPDATES:], self.updates["step"][-RECENT_UPDATES:]
        per_update = np.diff(times) / np.diff(steps)
        per_update = per_update[np.isfinite(per_update)]
        if per_update.size < UPDATES_FOR_SPEED:
            return None
        # The median ignores pauses, such as that between an interrupted run and its continuation.
        return max(0.0, float(np.median(per_update)) * (self.total_updates - self.step))


def read(output_dir: Path) -> RunHistory:
    """Read all records in `output_dir` except the images."""
    status, settings = read_status(output_dir), _parsed(_text(output_dir / CONFIG_FILE), yaml.safe_load)
    timings = status.get("timings")
    if not isinstance(timings, dict):
        timings = read_json(output_dir / TIMINGS_FILE).get("timings", {})
    seconds = {str(name).removesuffix("_s"): number(value) for name, value in timings.items()}
    updates = _by_step(_lines(output_dir / metrics.METRICS_FILE))
    run = RunHistory(
        status=status,
        settings={str(name): value for name, value in settings.items()},
        seconds_by_phase={name: value for name, value in seconds.items() if math.isfinite(value) and value >= 0},
        updates={
            name: np.array([number(update.get(name)) for update in updates], dtype=np.float64)
            for name in UPDATE_COLUMNS
        },
        held_out=[
            record
            for record in _by_step(_lines(output_dir / held_out.HELD_OUT_FILE))
            if all(math.isfinite(number(record.get(name))) for name in MEASUREMENT)
        ],
    )
    return replace(run, fidelity=validation.fidelity_by_step(output_dir, run.last_step))


def number(value: Any) -> float:
    """Return `value` if it is a number, else nan."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _by_step(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records that have a step, ascending; of equal steps the last, since a restarted run repeats some."""
    by_step = {record["step"]: record for record in records if type(record.get("step")) is int}
    return [by_step[step] for step in sorted(by_step)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _parsed(text: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Return the object in `text`; empty if there is none, or it is cut short."""
    try:
        content = parse(text)
    except (ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file with one per line; a line that is cut short gives an empty one."""
    return [_parsed(line, json.loads) for line in _text(path).split("\n")]
