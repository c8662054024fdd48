"""The end of other commands than `train` by a second signal: how to go on is said, and put down, at once."""

from __future__ import annotations

import io
import os
import signal
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from processes import wait_for

from raycontrolnet import signals
from raycontrolnet.errors import Interrupted
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.tune import sweep
from raycontrolnet.tune.lease import SweepLease
from raycontrolnet.tune.plan import SweepPlan
from raycontrolnet.tune.records import read_sweep


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("write_report", "write_results", "ranked_trials"):
        monkeypatch.setattr(sweep, name, lambda *_: [])
    return SimpleNamespace(folder=RunFolder(str(tmp_path)), sweep_dir=tmp_path, num_trials=4, facts=dict)


def test_a_second_signal(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, said = list[int](), io.StringIO()
    monkeypatch.setattr(os, "_exit", codes.append)
    recorded = sweep._recorded(cast("SweepPlan", plan), SweepLease(plan.folder, "one"), 0.0, said)
    with suppress(Interrupted), signals.ending_signals_raised(), recorded:
        for _ in range(2):
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                signal.pause()
        assert read_sweep(plan.sweep_dir)["status"] == "running"
        wait_for(lambda: read_sweep(plan.sweep_dir)["status"] == "interrupted", 30)
        signals._end(signal.SIGINT)
        raise KeyboardInterrupt
    assert codes == [130]
    assert said.getvalue() == (
        "\nInterrupted. 0 of 4 trials have ended and stand; the others go on from their last checkpoints with the same "
        f"command and --resume (--output_dir {plan.sweep_dir}).\n"
    )


def test_the_state_is_written_before_the_results(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[str] = []
    monkeypatch.setattr(sweep, "fetch_records", lambda _: states.append(read_sweep(plan.sweep_dir)["status"]))
    recorded = sweep._recorded(cast("SweepPlan", plan), SweepLease(plan.folder, "one"), 0.0, io.StringIO())
    with pytest.raises(Interrupted), recorded:
        raise KeyboardInterrupt
    assert states == ["interrupted"]


@pytest.mark.parametrize(
    ("place", "stands"),
    [
        ("latents.prepare:prepare", "What is cached stands; the same command goes on from there."),
        ("conditions.condition:condition", "Finished images stay; the same command continues from there."),
    ],
)
def test_other_commands(place: str, stands: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, _, function = place.partition(":")
    module, codes, said = import_module(f"raycontrolnet.{name}"), list[int](), io.StringIO()
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(module, f"_{function}", lambda *_: signals._end(signal.SIGINT))
    getattr(module, function)(None, stream=said)
    assert (codes, said.getvalue()) == ([130], f"\nInterrupted. {stands}\n")
