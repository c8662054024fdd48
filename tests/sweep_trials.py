"""Folders of trials: written without training as a sweep leaves them, and read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raycontrolnet.training import metrics
from raycontrolnet.tune import records
from raycontrolnet.tune.records import Trial, TrialRecord

STARTED = 1_795_357_408.0


def write_trial(
    sweep_dir: Path,
    index: int,
    settings: Mapping[str, Any],
    state: str = "finished",
    losses: Sequence[float] = (),
    *,
    gap: float = 0.0,
    every: int = 100,
    **facts: Any,
) -> Trial:
    """Write a trial with these val_losses, one per `every` steps, and `gap` as its last control gap."""
    record = TrialRecord(index, dict(settings), state, **({"seconds": 65.0 * (index + 1), "started": STARTED} | facts))
    records.write_record(sweep_dir, record)
    folder = records.folder_of(sweep_dir, record)
    write_updates(folder, every * len(losses))
    measurements = [
        {
            "step": every * number,
            "val_loss": loss,
            "val_loss_shuffled": loss + gap * (number == len(losses)),
            "control_gap": gap * (number == len(losses)),
            "control_gap_error": 0.001,
        }
        for number, loss in enumerate(losses, start=1)
    ]
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in measurements))
    return records.read_trial(sweep_dir, record, every)


def write_updates(folder: Path, last: int, loss: float = 0.5) -> None:
    """Write metrics.jsonl as a start of the run does: a new file in the place of the old."""
    partial = folder / "metrics.partial"
    partial.write_text("".join(update(step, loss) for step in range(1, last + 1)))
    partial.replace(folder / "metrics.jsonl")


def update(step: int, loss: float) -> str:
    line = {"step": step, "loss": loss, "lr": 1e-5, "images_per_second": 12.5, "time": STARTED + step}
    return json.dumps(line) + "\n"


def losses(folder: Path) -> list[float]:
    """Return the losses of a run, which has some."""
    found = [line["loss"] for line in metrics.read(folder / metrics.METRICS_FILE)]
    assert found
    return found


def write_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"1234")
    manifest = {
        "format": 1, "files": {"weights": 4}, "step": step, "samples": step, "seed": 0, "run_id": "r",
        "written_at": STARTED,
    }  # fmt: skip
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path
