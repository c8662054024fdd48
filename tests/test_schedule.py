"""The schedule of a run: updates, samples, and what is due."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raycontrolnet.config.settings import OptimConfig, StepConfig
from raycontrolnet.storage.checkpoint import Checkpoint
from raycontrolnet.training.schedule import Schedule


def plan(world_size: int, start: Checkpoint | None = None, num_samples: int = 13, **changes: Any) -> Schedule:
    return Schedule.of(StepConfig(train_batch_size=2, **changes), num_samples, world_size, start)


def checkpoint(step: int, samples: int) -> Checkpoint:
    return Checkpoint(Path("checkpoint"), step, samples, 0, "", {})


@pytest.mark.parametrize(
    ("world_size", "accumulation", "epochs", "updates"),
    [(1, 1, 1, 7), (2, 1, 1, 4), (1, 3, 1, 3), (2, 3, 2, 4), (1, 1, 3, 21)],
)
def test_updates_of_epochs(world_size: int, accumulation: int, epochs: int, updates: int) -> None:
    """ceil(ceil(N / (workers x batch)) / accumulation) an epoch, by hand."""
    changes: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "num_train_epochs": epochs}
    assert plan(world_size, **changes).total_updates == updates


def test_max_train_steps_overrides_epochs() -> None:
    assert plan(2, max_train_steps=5, num_train_epochs=9).total_updates == 5


def test_a_continued_run_ends_where_it_would_have() -> None:
    assert plan(1, checkpoint(5, 10), num_train_epochs=3).total_updates == 21


@pytest.mark.parametrize(("world_size", "updates"), [(4, 500 + 63), (1, 500 + 250)])
def test_another_number_of_workers_does_what_is_left(world_size: int, updates: int) -> None:
    """Half of 1,000 samples were consumed by 500 updates of one: what is left is counted in samples."""
    assert plan(world_size, checkpoint(500, 500), 1000).total_updates == updates


def test_scale_lr() -> None:
    optim = OptimConfig(scale_lr=True, learning_rate=1e-5)
    rate = plan(4, gradient_accumulation_steps=3).learning_rate(optim)
    assert rate == pytest.approx(1e-5 * 4 * 3 * 2)


def test_samples_of_workers_follow_each_other() -> None:
    two = plan(2)
    firsts = [two.first_sample(12, micro_step, rank) for micro_step in range(3) for rank in range(2)]
    assert firsts == [12, 14, 16, 18, 20, 22]


def test_when_something_is_due() -> None:
    schedule = plan(1, max_train_steps=5)
    for every, due in ((2, [2, 4, 5]), (3, [3, 5])):
        assert [step for step in range(1, 6) if schedule.is_due(every, step)] == due
