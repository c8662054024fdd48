"""Validations that the first Ctrl-C cuts off: at once, and made up for by the run that goes on."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
from runs import Settings, column, equal, run, weights

from raycontrolnet.errors import Interrupted
from raycontrolnet.storage.checkpoint import all_checkpoints
from raycontrolnet.training import held_out
from raycontrolnet.training.validation import MADE_UP_FILE

STEP = (diffusers.UniPCMultistepScheduler, "step")
BATCH = (held_out, "controlnet_loss")
PER_IMAGE = 20
"""Steps of the sampler."""


@pytest.fixture(scope="module")
def settings(validated_settings: Settings) -> Settings:
    return validated_settings | {"validation_split": 5, "train_batch_size": 2, "max_train_steps": 4, "use_ema": True}


@pytest.fixture(scope="module")
def whole(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run that nobody interrupted."""
    return run(settings, tmp_path_factory.mktemp("whole") / "run")


def interrupted_at(place: tuple[Any, str], call: int, work: Callable[[], object]) -> int:
    """Interrupt `work` in a call of the function at `place`; return the number of its calls."""
    owner, name = place
    original, calls = getattr(owner, name), []

    def interrupted(*args: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(Interrupted) as told:
            work()
    assert "stands: go on with --resume_from_checkpoint latest" in str(told.value)
    return len(calls)


def check_is_whole(out: Path, whole: Path) -> None:
    assert column(out, "loss") == column(whole, "loss")
    assert [(line["step"], line["val_loss"], line["control_gap"]) for line in held_out.read(out)] == [
        (line["step"], line["val_loss"], line["control_gap"]) for line in held_out.read(whole)
    ]
    assert equal(weights(out), weights(whole))
    left, expected = (
        {path.relative_to(folder): path.read_bytes() for path in folder.glob("validation/*/*")}
        for folder in (out, whole)
    )
    assert len(expected) == 2 * (4 + 2 + 2 + 1)
    assert left == expected
    assert not (out / MADE_UP_FILE).exists()


@pytest.mark.parametrize(
    ("place", "call", "calls", "step"),
    [
        (STEP, 1, 1, 2),
        (STEP, PER_IMAGE + 7, PER_IMAGE + 7, 2),
        (BATCH, 2, 2, 2),  # each batch has two losses
        (BATCH, 9, 10, 4),  # the second batch of the last validation
        (STEP, 5 * PER_IMAGE + 3, 5 * PER_IMAGE + 3, 4),  # the final images
    ],
)
def test_it_ends_at_once_and_is_made_up(
    place: tuple[Any, str], call: int, calls: int, step: int, settings: Settings, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert interrupted_at(place, call, lambda: run(settings, out, checkpointing_steps=100)) == calls
    assert [each.step for each in all_checkpoints(out)] == [step]
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    assert not (out / f"validation/step-{step:06d}/metadata.jsonl").exists()
    run(settings, out, resume_from_checkpoint="latest")
    check_is_whole(out, whole)


def test_what_is_made_up_may_be_interrupted_too(settings: Settings, whole: Path, tmp_path: Path) -> None:
    """As often as users like: only images that kill a run are not tried again."""
    out = tmp_path / "run"
    resumed = settings | {"resume_from_checkpoint": "latest"}
    interrupted_at(BATCH, 3, lambda: run(settings, out))
    assert held_out.read(out) == []
    for place in (BATCH, STEP, STEP):
        assert interrupted_at(place, 2, lambda: run(resumed, out)) == 2
        assert [each.step for each in all_checkpoints(out)] == [2]
        assert not (out / MADE_UP_FILE).exists()
    assert [line["step"] for line in held_out.read(out)] == [2]
    run(resumed, out)
    check_is_whole(out, whole)


def test_the_last_measurement_is_made_up_after_any_number_of_updates(settings: Settings, tmp_path: Path) -> None:
    """It is due after the last update, of whatever number."""
    settings, out = settings | {"max_train_steps": 3}, tmp_path / "run"
    whole = run(settings, tmp_path / "whole")
    interrupted_at(BATCH, 9, lambda: run(settings, out))
    assert [line["step"] for line in held_out.read(out)] == [2]
    run(settings, out, resume_from_checkpoint="latest")
    assert [(line["step"], line["val_loss"]) for line in held_out.read(out)] == [
        (line["step"], line["val_loss"]) for line in held_out.read(whole)
    ]
    assert [line["step"] for line in held_out.read(out)] == [2, 3]
