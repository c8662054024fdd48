"""The sample order and the keyed streams: functions of (seed, k) that must not change, or resumed runs would."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from raycontrolnet.data.order import Purpose, SampleOrder, keyed_rng, keyed_seed


def rows(order: SampleOrder, epoch: int) -> list[int]:
    return [order.row(k) for k in range(epoch * order.num_samples, (epoch + 1) * order.num_samples)]


@pytest.mark.parametrize("num_rows", [1, 2, 13, 1000])
def test_every_epoch_is_a_permutation_of_all_rows(num_rows: int) -> None:
    order = SampleOrder(num_rows, seed=0)
    assert order.num_samples == num_rows
    for epoch in (0, 1, 2, 1000):
        assert sorted(rows(order, epoch)) == list(range(num_rows))


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(rows(SampleOrder(50, seed), epoch)) for seed in (0, 1, 2**40) for epoch in range(4)]
    assert len(set(orders)) == 12
    assert tuple(range(50)) not in orders


def test_every_row_comes_to_every_place() -> None:
    """A shuffle that left rows near their place would show."""
    order = SampleOrder(4, seed=0)
    seen = [tuple(rows(order, epoch)) for epoch in range(600)]
    counts = [seen.count(permutation) for permutation in itertools.permutations(range(4))]
    assert sum(counts) == 600
    assert sum((count - 25) ** 2 / 25 for count in counts) < 23 + 5 * 46**0.5


def test_random_access_is_sequential_access() -> None:
    order = SampleOrder(13, seed=3)
    sequential = [order.row(k) for k in range(200)]
    ks = list(range(200))
    random.Random(0).shuffle(ks)
    fresh = SampleOrder(13, seed=3)
    assert {k: fresh.row(k) for k in ks} == dict(enumerate(sequential))
    assert [type(row) for row in sequential] == [int] * 200


def test_two_orders_at_a_time_do_not_disturb_each_other() -> None:
    orders = [SampleOrder(13, seed) for seed in range(8)]
    alone = [[order.row(k) for k in range(30)] for order in orders]
    together = [[order.row(k) for order in orders] for k in range(30)]
    assert [list(column) for column in zip(*together, strict=True)] == alone


def test_a_subset_is_seeded_and_the_same_in_every_epoch() -> None:
    order = SampleOrder(100, seed=0, max_samples=10)
    assert order.num_samples == 10
    subset = set(rows(order, 0))
    assert len(subset) == 10
    assert subset <= set(range(100))
    assert subset != set(range(10))
    for epoch in range(1, 5):
        assert set(rows(order, epoch)) == subset
    assert len({tuple(rows(order, epoch)) for epoch in range(5)}) == 5
    assert set(rows(SampleOrder(100, seed=0, max_samples=10), 7)) == subset
    assert set(rows(SampleOrder(100, seed=1, max_samples=10), 0)) != subset
    assert subset < set(rows(SampleOrder(100, seed=0, max_samples=20), 0)), "a larger subset holds the smaller"


@pytest.mark.parametrize("max_samples", [13, 14, 10**9])
def test_a_subset_of_all_rows_is_no_subset(max_samples: int) -> None:
    order, plain = SampleOrder(13, 0, max_samples), SampleOrder(13, 0)
    assert order.num_samples == 13
    assert [order.row(k) for k in range(40)] == [plain.row(k) for k in range(40)]


def test_streams_of_different_keys_are_independent() -> None:
    keys = [(seed, purpose, key) for seed in (0, 1, 2**62) for purpose in Purpose for key in (0, 1, 10**9)]
    draws = np.array([keyed_rng(*key).standard_normal(2000) for key in keys])
    correlations = np.corrcoef(draws) - np.eye(len(keys))
    assert len(keys) == 9 * len(Purpose)
    assert np.abs(correlations).max() < 5 / 2000**0.5
    assert len({keyed_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= keyed_seed(*key) < 2**63 for key in keys)


def test_a_stream_does_not_depend_on_what_was_drawn_before() -> None:
    first = keyed_rng(0, Purpose.PROMPT, 5).random(3)
    keyed_rng(0, Purpose.PROMPT, 4).random(100)
    np.random.seed(1)
    assert np.array_equal(keyed_rng(0, Purpose.PROMPT, 5).random(3), first)


def test_the_order_is_the_one_of_runs_that_were_begun() -> None:
    """Golden values. If one changes, a checkpoint of an earlier version goes on with other rows: raise its format."""
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "SUBSET": 0, "ORDER": 1, "PROMPT": 2, "DIFFUSION": 3, "CONTROLNET": 4, "HELD_OUT": 5, "HELD_OUT_PROMPT": 6,
        "TURNS": 7, "AUGMENTATION": 8,
    }  # fmt: skip
    assert rows(SampleOrder(13, seed=0), 0) == GOLDEN_EPOCH_0
    assert rows(SampleOrder(13, seed=0), 1) == GOLDEN_EPOCH_1
    assert rows(SampleOrder(100, seed=7, max_samples=5), 3) == GOLDEN_SUBSET
    assert keyed_seed(0, Purpose.CONTROLNET, 0) == GOLDEN_SEED
    assert keyed_rng(0, Purpose.DIFFUSION, 12).integers(1000, size=4).tolist() == GOLDEN_INTEGERS


GOLDEN_EPOCH_0 = [0, 7, 1, 12, 9, 3, 11, 4, 6, 10, 8, 2, 5]
GOLDEN_EPOCH_1 = [4, 2, 11, 8, 6, 0, 7, 1, 9, 12, 3, 5, 10]
GOLDEN_SUBSET = [50, 54, 88, 26, 42]
GOLDEN_SEED = 2494635221133837528
GOLDEN_INTEGERS = [382, 383, 202, 975]
