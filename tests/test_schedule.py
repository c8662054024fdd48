"""The schedule of a run: updates, samples, and what is due."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raycontrolnet.config.settings import OptimConfig, StepConfig
from raycontrolnet.storage.checkpoint import Checkpoint
from raycontrolnet.training.schedule import Schedule, Share


def plan(num_workers: int, start: Checkpoint | None = None, num_samples: int = 13, **changes: Any) -> Schedule:
    return Schedule.of(StepConfig(train_batch_size=2, **changes), num_samples, num_workers, start)


def checkpoint(step: int, samples: int) -> Checkpoint:
    return Checkpoint(Path("checkpoint"), step, samples, 0, "", {})


@pytest.mark.parametrize(
    ("num_workers", "accumulation", "epochs", "updates"),
    [(1, 1, 1, 7), (2, 1, 1, 4), (1, 3, 1, 3), (2, 3, 2, 4), (1, 1, 3, 21)],
)
def test_updates_of_epochs(num_workers: int, accumulation: int, epochs: int, updates: int) -> None:
    """ceil(ceil(N / (workers x batch)) / accumulation) an epoch, by hand."""
    changes: dict[str, Any] = {"gradient_accumulation_steps": accumulation, "num_train_epochs": epochs}
    assert plan(num_workers, **changes).total_updates == updates


def test_max_train_steps_overrides_epochs() -> None:
    assert plan(2, max_train_steps=5, num_train_epochs=9).total_updates == 5


def test_a_continued_run_ends_where_it_would_have() -> None:
    assert plan(1, checkpoint(5, 10), num_train_epochs=3).total_updates == 21


@pytest.mark.parametrize(("num_workers", "updates"), [(4, 500 + 63), (1, 500 + 250)])
def test_another_number_of_workers_does_what_is_left(num_workers: int, updates: int) -> None:
    """Half of 1,000 samples were consumed by 500 updates of one: what is left is counted in samples."""
    assert plan(num_workers, checkpoint(500, 500), 1000).total_updates == updates


def test_scale_lr() -> None:
    optim = OptimConfig(scale_lr=True, learning_rate=1e-5)
    rate = plan(4, gradient_accumulation_steps=3).learning_rate(optim)
    assert rate == pytest.approx(1e-5 * 4 * 3 * 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("micro_batches", [6, 7])
def test_an_update_is_the_same_for_any_number_of_workers(world_size: int, micro_batches: int) -> None:
    """Every worker does its places of the stream in order, and the average that DDP takes is that of all of them."""
    shares = [Share(rank, world_size, micro_batches) for rank in range(world_size)]
    done = [0] * world_size
    for update in range(2 * world_size):
        places, weights = [], []
        for share in shares:
            count = share.micro_steps(update)
            assert count >= 1, "a worker without a micro-step would miss the collective"
            places += [share.place(done[share.rank] + step) for step in range(count)]
            weights += [share.weight(update) / world_size / count] * count
            done[share.rank] += count
        assert sorted(places) == list(range(update * micro_batches, (update + 1) * micro_batches))
        assert weights == pytest.approx([1 / micro_batches] * micro_batches, rel=1e-12)


def test_equal_shares_weigh_exactly_one() -> None:
    assert {Share(rank, 3, 3 * 7).weight(update) for rank in range(3) for update in range(4)} == {1.0}
    assert plan(3, gradient_accumulation_steps=7).micro_batches == 21


def test_when_something_is_due() -> None:
    schedule = plan(1, max_train_steps=5)
    for every, due in ((2, [2, 4, 5]), (3, [3, 5])):
        assert [step for step in range(1, 6) if schedule.is_due(every, step)] == due
