"""Rate and time left, which validations must not spoil."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from raycontrolnet import text
from raycontrolnet.report.progress import Progress
from raycontrolnet.training import validation
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
    assert progress.line() == f"step {until}/60 | loss 0.5000 | lr 1e-5 | {shown}"


def show_validation(folder: Path, step: int, num_drawn: int, *, finished: bool = False) -> None:
    """Leave what a validation has drawn of its images."""
    drawn = validation.step_folder(folder, step)
    drawn.mkdir(parents=True, exist_ok=True)
    for image in range(num_drawn):
        (drawn / f"pair-00-image-{image:02d}.png").touch()
    if finished:
        for name in ("pair-00-control.png", "pair-00-grid.png", "metadata.jsonl"):
            (drawn / name).touch()


def test_drawing_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the update that is validated to the last image; a plain log gets it now and then as well."""
    monkeypatch.setattr(text, "PLAIN_INTERVAL_S", 0.0)
    stream = io.StringIO()
    progress = Progress(tmp_path, 25, 0, stream, validation_steps=10, num_images=4)

    def shown(**how: Any) -> str:
        """Return the line that is printed now; empty if there is none."""
        before = len(stream.getvalue())
        progress.update(**how)
        return stream.getvalue()[before:].rstrip()

    training = "step {}/25 | loss 0.5000 | lr 1e-5 | 2 images/s | "
    write_updates(tmp_path, 9, 10)
    assert shown() == f"{training.format(9)}0:32 and 3 validations left"
    write_updates(tmp_path, 10, 10)
    assert shown() == "step 10/25 | loss 0.5000 | validating, 0 s"
    assert not shown()
    show_validation(tmp_path, 10, 3)
    assert shown() == "step 10/25 | loss 0.5000 | validating, image 3/4, 0 s"
    show_validation(tmp_path, 10, 4, finished=True)
    assert shown() == f"{training.format(10)}0:30 and 2 validations left"
    write_updates(tmp_path, 11, 10)
    assert shown().startswith(training.format(11))
    write_updates(tmp_path, 25, 10)
    assert shown() == "step 25/25 | loss 0.5000 | validating, 0 s"
    assert shown(last=True) == f"{training.format(25)}0:00 left"


@pytest.mark.parametrize("given", [{"num_images": 4}, {"validation_steps": 10}])
def test_nothing_is_drawn(given: dict[str, Any], tmp_path: Path) -> None:
    progress = Progress(tmp_path, 60, 0, stream := io.StringIO(), **given)
    write_updates(tmp_path, 10, None)
    progress.update()
    assert "validating" not in stream.getvalue()
