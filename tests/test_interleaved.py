"""Several sequences of rows as one: the order of buckets and of mixed sources, a function of (seed, k) alone."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from raycontrolnet.data.interleaved import Interleaved, grouped
from raycontrolnet.data.order import RowSequence, SampleOrder, Shuffled
from raycontrolnet.training.schedule import Share

SIZES = (5, 12, 29)
"""Rows of each of 3 buckets: none is a multiple of a batch, and one is hardly larger than one."""
LABELS: NDArray[np.int64] = np.random.default_rng(0).permutation(np.repeat(np.arange(3), SIZES))
NUM_ROWS = sum(SIZES)
SEED = 3


def bucketed(batch_size: int, seed: int = SEED) -> RowSequence:
    return grouped(NUM_ROWS, LABELS, seed, turn=batch_size)


def batches(sequence: RowSequence, batch_size: int, number: int) -> list[list[int]]:
    rows = [sequence.row(k) for k in range(number * batch_size)]
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


@pytest.mark.parametrize("batch_size", [2, 5])
def test_every_batch_is_of_one_bucket_and_every_row_comes_once_an_epoch(batch_size: int) -> None:
    """After e epochs no row was used more than e times, and what is left out is less than a batch of each bucket."""
    sequence = bucketed(batch_size)
    for epochs in (1, 2, 3, batch_size, 7 * batch_size):
        # Epochs end where every bucket's turns do.
        turns = sum(epochs * size // batch_size for size in SIZES)
        found = batches(sequence, batch_size, turns)
        assert all(len(set(LABELS[batch])) == 1 for batch in found)
        counts = Counter(row for batch in found for row in batch)
        assert set(counts.values()) <= {epochs - 1, epochs} - {0}
        for label, size in enumerate(SIZES):
            used = sum(counts[row] for row in np.flatnonzero(label == LABELS).tolist())
            assert used == epochs * size // batch_size * batch_size
        if epochs % batch_size == 0:
            assert [counts[row] for row in range(NUM_ROWS)] == [epochs] * NUM_ROWS


@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_bucket_goes_through_its_own_permutations(batch_size: int) -> None:
    """A row never comes again before all others of its bucket have come."""
    rows = np.concatenate(batches(bucketed(batch_size), batch_size, 300))
    for label, size in enumerate(SIZES):
        own = rows[LABELS[rows] == label]
        whole = own[: len(own) // size * size].reshape(-1, size)
        assert len(whole) >= 3
        assert all(sorted(epoch) == np.flatnonzero(label == LABELS).tolist() for epoch in whole)
        assert len({tuple(epoch) for epoch in whole}) > len(whole) // 2


def label(sequence: Interleaved, index: int) -> int:
    """Return which of the sequences the row at `index` is of."""
    epoch = sequence._epoch(index)
    return int(sequence._labels(epoch)[(index - sequence._begin(epoch)) // sequence.turn])


def test_turns_are_mixed_over_an_epoch() -> None:
    sequence = bucketed(2)
    assert isinstance(sequence, Interleaved)
    by_epoch = []
    for epoch in range(3):
        begin, end = (sum((epoch + more) * size // 2 for size in SIZES) for more in (0, 1))
        by_epoch.append([label(sequence, 2 * turn) for turn in range(begin, end)])
    assert [Counter(labels)[2] for labels in by_epoch] == [14, 15, 14]
    assert all(labels != sorted(labels) for labels in by_epoch)
    assert by_epoch[0] != by_epoch[2]
    assert [LABELS[sequence.row(k)] for k in range(90)] == [label(sequence, k) for k in range(90)]


def test_random_access_is_sequential_access_and_holds_no_state() -> None:
    """The rows of (seed, k): in any order, from a copy that was pickled, and by ranges."""
    sequence = bucketed(5)
    rows = [sequence.row(k) for k in range(400)]
    ks = random.Random(0).sample(range(400), 400)
    copy = pickle.loads(pickle.dumps(bucketed(5)))
    assert {k: copy.row(k) for k in ks} == dict(enumerate(rows))
    assert [type(row) for row in rows] == [int] * 400
    for start, stop in ((0, 400), (17, 18), (44, 211), (100, 100)):
        assert sequence.between(start, stop).tolist() == rows[start:stop]
    far = 10**12 + 3
    assert sequence.between(far, far + 100).tolist() == [copy.row(k) for k in range(far, far + 100)]
    assert rows != [bucketed(5, seed=4).row(k) for k in range(400)]


@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers_share_the_same_batches(batch_size: int, num_workers: int) -> None:
    """An update of 4 micro-batches is of the same rows whoever does it, from the start and from any update on."""
    sequence, micro_batches = bucketed(batch_size), 4
    expected = batches(sequence, batch_size, 12 * micro_batches)
    for first in (0, 5):
        shares = [Share(rank, num_workers, micro_batches) for rank in range(num_workers)]
        for update in range(7):
            places = []
            for share in shares:
                begin = sum(share.micro_steps(earlier) for earlier in range(update))
                places += [share.place(begin + step) for step in range(share.micro_steps(update))]
            assert sorted(places) == list(range(update * micro_batches, (update + 1) * micro_batches))
            for place in places:
                start = (first * micro_batches + place) * batch_size
                rows = [sequence.row(k) for k in range(start, start + batch_size)]
                assert rows == expected[first * micro_batches + place]
                assert len(set(LABELS[rows])) == 1


def test_one_bucket_is_the_order_of_a_run_without() -> None:
    labels = np.full(NUM_ROWS, 7)

    def of_one_label(rows: NDArray[np.int64] | int) -> RowSequence:
        return grouped(rows, labels, SEED, turn=4)

    for max_samples, num_held_out in ((None, 0), (10, 0), (None, 5), (10, 5)):
        plain = SampleOrder(NUM_ROWS, SEED, max_samples, [3], num_held_out)
        one = SampleOrder(NUM_ROWS, SEED, max_samples, [3], num_held_out, of_one_label)
        assert [one.row(k) for k in range(200)] == [plain.row(k) for k in range(200)]
        wrapped = Interleaved([Shuffled(plain.rows if plain.rows is not None else NUM_ROWS, SEED)], SEED, turn=4)
        assert [wrapped.row(k) for k in range(200)] == [plain.row(k) for k in range(200)]
        assert wrapped.between(30, 100).tolist() == [plain.row(k) for k in range(30, 100)]


def test_a_bucket_smaller_than_a_batch_is_not_left_out() -> None:
    sequence = Interleaved([Shuffled(np.arange(2), 0, (1,)), Shuffled(np.arange(2, 40), 0, (2,))], 0, turn=8)
    counts = Counter(row for batch in batches(sequence, 8, 4 * 40) for row in batch)
    assert set(counts.values()) == {4 * 8}


def test_weights_are_met_exactly_in_the_long_run() -> None:
    """Sources of 10 and 40 rows, weighed 3 to 2 in epochs of 50: 3 times the one, half of the other."""
    sources = [Shuffled(np.arange(10), 0, (1,), Fraction(3)), Shuffled(np.arange(10, 50), 0, (2,), Fraction(1, 2))]
    sequence = Interleaved(sources, 0)
    assert sequence.share == 50
    counts = Counter(sequence.row(k) for k in range(50 * 20))
    assert {counts[row] for row in range(10)} == {60}
    assert {counts[row] for row in range(10, 50)} == {10}
    one_epoch = [sequence.row(k) for k in range(50)]
    assert sum(row < 10 for row in one_epoch) == 30


def test_buckets_over_weighted_sources_nest() -> None:
    """Batches of one bucket, in which two sources are mixed by their weights."""
    source = np.random.default_rng(1).integers(0, 2, NUM_ROWS)
    repeats = (Fraction(1, 2), Fraction(3))

    def of_source(rows: NDArray[np.int64] | int, key: tuple[int, ...]) -> RowSequence:
        assert not isinstance(rows, int)
        return Shuffled(rows, SEED, key, repeats[source[rows[0]]])

    nested = grouped(
        NUM_ROWS, LABELS, SEED, turn=4,
        part=lambda rows, key: grouped(rows, source, SEED, key=key, part=of_source),
    )  # fmt: skip
    assert nested.share == sum(repeats[each] for each in source)
    epochs = 80
    found = batches(nested, 4, int(epochs * nested.share) // 4)
    assert all(len(set(LABELS[batch])) == 1 for batch in found)
    assert any(len(set(source[batch])) == 2 for batch in found)
    counts = Counter(row for batch in found for row in batch)
    for row in range(NUM_ROWS):
        assert abs(counts[row] - epochs * repeats[source[row]]) <= 3
    assert pickle.loads(pickle.dumps(nested)).between(500, 900).tolist() == nested.between(500, 900).tolist()


def test_reading_an_epoch_costs_a_permutation_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant time for each k, also of a copy, as each loading task unpickles its own."""
    counted: list[int] = []
    whole = Interleaved._rows

    def counting(self: Interleaved, epoch: int) -> NDArray[np.int64]:
        counted.append(epoch)
        return whole(self, epoch)

    monkeypatch.setattr(Interleaved, "_rows", counting)
    for k in range(3 * NUM_ROWS):
        pickle.loads(pickle.dumps(bucketed(5, seed=987))).row(k)
    assert counted == [0, 1, 2, 3]
