"""Numbers, sizes, durations and errors in words, and counters on a terminal and in a log."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from test_sweep_live import Terminal, resize

from raycontrolnet import text
from raycontrolnet.report.progress import Progress, progress
from raycontrolnet.text import Counter


def test_in_words() -> None:
    assert [text.duration(seconds) for seconds in (0, 65, 3725, 90_000)] == ["0:00", "1:05", "1:02:05", "25:00:00"]
    assert [text.duration(seconds, fine=True) for seconds in (0.1234, 20.5, 60)] == ["0.123 s", "20.5 s", "1:00"]
    sizes = {0: "0 B", 999: "999 B", 65536: "65.5 kB", 2.5e9: "2.5 GB", 1e13: "10 TB"}
    assert {size: text.file_size(size) for size in sizes} == sizes
    counts = {0: "0 rows", 1: "1 row", 1000: "1,000 rows", 0.5: "0.5 rows"}
    assert {number: text.counted(number, "row") for number in counts} == counts
    assert text.shorten(["a", "b"], "files") == ["a", "b"]
    assert text.shorten(["a"] * 1234, "files") == [*["a"] * 10, "... 1,234 files in all"]


def test_small_numbers_are_not_0() -> None:
    shown = {0.0: "0.0000", 0.25: "0.2500", 1.5: "1.5000", 0.001: "0.0010", 0.00034567: "0.00035", 1e-8: "1e-8"}
    assert {number: text.decimals(number) for number in shown} == shown
    assert [text.decimals(-0.0004, 2), text.decimals(0.1, 2)] == ["-0.0004", "0.10"]
    assert [text.above(number, 5e-7, 2) for number in (0.0, 1e-8, -5e-7, -6e-7)] == ["0", "<5e-7", "<5e-7", "-6e-7"]
    assert text.plus_minus(2e-8, 1e-7) == " ± <2e-7 (2 standard errors)"


@pytest.mark.parametrize(
    ("error", "message", "line"),
    [
        (OSError(28, "No space left", "a.png"), "No space left", "OSError: [Errno 28] No space left: 'a.png'"),
        (ValueError(" one\n two "), "one two", "ValueError: two"),
        (RuntimeError(), "RuntimeError", "RuntimeError: no message"),
    ],
)
def test_errors(error: Exception, message: str, line: str) -> None:
    assert text.error_message(error) == message
    assert text.error_message(error, 3) == message[:3] or not str(error)
    assert text.one_line(error) == line


def test_the_nearest_name() -> None:
    """Case counts least: a name that differs by nothing else is the nearest."""
    known = ["Adam", "RAdam", "AdamW", "fp16"]
    nearest = {"radam": "RAdam", "adam": "Adam", "ADAMW": "AdamW", "Adamm": "Adam", "fp_16": "fp16"}
    assert {word: text.perhaps(word, known) for word in nearest} == {
        word: f"; perhaps you meant {name}" for word, name in nearest.items()
    }
    assert text.perhaps("qqq", known) == ""


def count(stream: io.StringIO) -> None:
    counter = Counter("latents", "images", 2000, 500, stream)
    counter.started -= 1e6  # so that a slow machine does not change the rate
    for _ in range(3):
        counter.advance(500)
    counter.close()


def test_a_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["latents: 500/2,000 images", "latents: 2,000/2,000 images | 0.0015 images/s | 0:00 left"]
    log, screen = io.StringIO(), Terminal()
    count(log)
    assert log.getvalue().splitlines() == lines  # the others came too soon
    resize(monkeypatch, 80, 24)
    count(screen)
    assert screen.screen(80, 24) == [lines[1], ""]
    assert "latents: 1,500/2,000 images | 0.001 images/s | 138:5" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[?25h")  # the cursor is back
    resize(monkeypatch, 30, 24)
    count(narrow := Terminal())
    assert narrow.screen(30, 24) == [lines[1][:29], ""]


def test_progress_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resize(monkeypatch, 120, 24)
    measured = {"step": 2, "val_loss": 0.5, "val_loss_shuffled": 0.6, "control_gap": 0.1, "control_gap_error": 0.01}
    with progress(Progress(tmp_path, 9, 0, stream := Terminal())):
        update = {"loss": 0.25, "lr": 1e-3, "samples": 4, "images_per_second": 1.5, "time": 0.0}
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step} | update) + "\n" for step in (1, 2)))
        (tmp_path / "validation.jsonl").write_text(json.dumps(measured) + "\n")
    measurement, line, end = stream.screen(120, 24)
    assert measurement.startswith("step 2: held-out loss 0.5000")
    assert (line, end) == ("step 2/9 | loss 0.2500 | lr 0.001 | 1.5 images/s", "")
