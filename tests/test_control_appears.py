"""The benchmark of when control appears: what it runs again, when it ends a run, and its table."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = runpy.run_path(str(Path(__file__).with_name("benchmarks") / "control_appears.py"))
DESIGN = {"updates": 400, "every": 20, "rows": 64, "confirm": 3}


def result(name: str, seed: int, appeared: int | None, flags: str = "") -> dict[str, Any]:
    return {"name": name, "flags": flags, "seed": seed, "appeared": appeared, **DESIGN}


def test_the_table() -> None:
    """Means and standard errors by hand; differences are taken seed by seed."""
    runs = [result("plain", seed, appeared) for seed, appeared in enumerate((200, 260, 320))]
    runs += [result("soon", seed, appeared, "--snr_gamma 5") for seed, appeared in enumerate((100, 180, 200))]
    runs += [result("never", 0, None), result("never", 1, 300), result("once", 1, 240)]
    assert BENCHMARK["table"](runs)[2:] == [
        "| plain |  | 260 ± 35 |  | 200, 260, 320 |",
        "| soon | `--snr_gamma 5` | 160 ± 31 | -100 ± 12 | 100, 180, 200 |",
        "| never |  | ≥ 350 ± 50 | +120 ± 80 | none, 300 |",
        "| once |  | 240 | -20 | 240 |",
    ]


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    """Another seed, other flags or another design are; a line that was cut off counts for nothing."""
    file = tmp_path / "results.jsonl"
    assert BENCHMARK["read"](file) == []
    file.write_text(json.dumps(result("plain", 0, 200)) + '\n{"name": "pla')
    results = BENCHMARK["read"](file)
    key = {name: value for name, value in result("plain", 0, None).items() if name != "appeared"}
    assert BENCHMARK["found"](results, key)["appeared"] == 200
    for changed in ({"seed": 1}, {"flags": "--snr_gamma 5"}, {"updates": 500}, {"name": "other"}):
        assert BENCHMARK["found"](results, key | changed) is None


def test_settings_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("plain:\nmin-SNR: --snr_gamma 5\n")
    assert BENCHMARK["read_settings"](tmp_path / "mine.yaml") == {"plain": "", "min-SNR": "--snr_gamma 5"}
    assert len(BENCHMARK["read_settings"](None)) == 10


def test_every_settings_flags_are_those_of_a_run(tmp_path: Path) -> None:
    from raycontrolnet.cli import parse

    for name, flags in BENCHMARK["read_settings"](None).items():
        key = {"name": name, "flags": flags, "seed": 3, **DESIGN}
        _, _, module, train, *arguments = BENCHMARK["command"](key, tmp_path / "run")
        assert (module, train) == ("raycontrolnet", "train")
        config = parse("train", arguments)
        assert (config.seed, config.max_train_steps, config.validation_steps) == (3, 400, 20)
        assert (config.learning_rate, config.train_batch_size) == (1e-3, 16), "as the demo"


@pytest.mark.parametrize("control", [True, False])
def test_a_run_ends_once_control_has_appeared(control: bool, tmp_path: Path) -> None:
    """A program that measures as a run does stands in for it: control is there from update 60 on, or never."""
    lines = [
        json.dumps({"step": step, "val_loss": 1.0, "control_gap_error": 0.01, "control_gap": gap})
        for step in range(20, 201, 20)
        for gap in [0.5 if control and step >= 60 else 0.0]
    ]
    program = (
        "import signal, sys, time\nsignal.signal(signal.SIGINT, lambda *_: sys.exit(130))\n"
        f"for line in {lines!r}:\n"
        f"    open({str(tmp_path / 'validation.jsonl')!r}, 'a').write(line + chr(10))\n    time.sleep(0.4)\n"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program])
    assert BENCHMARK["_wait"](process, tmp_path, 3) == (128 + signal.SIGINT if control else 0)
    measured = (tmp_path / "validation.jsonl").read_text().count("\n")
    assert (measured < 10) == control
    assert measured >= 6
