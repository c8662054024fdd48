"""Rate and time left, which validations must not spoil."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from raycontrolnet.report.progress import Progress
from raycontrolnet.training.metrics import METRICS_FILE

UPDATE_S, VALIDATION_S, BATCH = 2.0, 100.0, 4


def write_updates(output_dir: Path, until: int, validation_steps: int | None) -> None:
    """Write updates of 2 s, and 100 s of validation after every `validation_steps`."""
    now, lines = 1000.0, []
    for step in range(1, until + 1):
        now += UPDATE_S
        rate = BATCH / UPDATE_S
        figures = {"loss": 0.5, "lr": 1e-5, "samples": step * BATCH, "images_per_second": rate, "time": now}
        lines.append(json.dumps({"step": step, **figures}) + "\n")
        if validation_steps and step % validation_steps == 0:
            now += VALIDATION_S
    (output_dir / METRICS_FILE).write_text("".join(lines))


@pytest.mark.parametrize(
    ("until", "validation_steps", "shown"),
    [
        (2, None, "2 images/s"),  # too few to tell
        (10, None, "2 images/s | 1:40 left"),
        (9, 10, "2 images/s | 1:42 and 6 validations left"),
        (10, 10, "2 images/s | 1:40 and 5 validations left"),  # being drawn
        (11, 10, "2 images/s | 9:58 left"),  # 49 updates, 5 validations
        (25, 10, "2 images/s | 7:50 left"),  # 35 updates, 4 validations
        (60, 10, "2 images/s | 0:00 left"),
        (59, 25, "2 images/s | 1:42 left"),  # the last update is validated too
    ],
)
def test_rate_and_time_left(tmp_path: Path, until: int, validation_steps: int | None, shown: str) -> None:
    progress = Progress(tmp_path, 60, 0, io.StringIO(), validation_steps=validation_steps)
    write_updates(tmp_path, until, validation_steps)
    progress.update()
    assert progress.line() == f"step {until}/60 | loss 0.5000 | lr 1e-05 | {shown}"
