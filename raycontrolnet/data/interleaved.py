"""Endless sequences of rows, and several of them interleaved in shares: the order of buckets and of mixed sources.

    Shuffled      index -> row: a permutation of its rows for every epoch (order.py)
    Interleaved   index -> row: turns of several sequences, drawn per epoch, each as often as its share says

Both are functions of (seed, index): they hold no state, can be read anywhere, and nest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from raycontrolnet.data.order import Purpose, Rows, RowSequence, Shuffled, keyed_rng


class Interleaved:
    """Turns of several sequences, drawn per epoch in proportion to their shares.

    A turn takes the next `turn` rows of one sequence, which goes on where its last turn ended. By the end of epoch e,
    sequence s has had floor((e + 1) x share / turn) turns: what does not divide is carried to the next epoch, so that
    in the long run no row is left out or used more often than its share. With one sequence, the result is that
    sequence itself.

    Args:
        sequences: at least one, of which the shares together are at least 1.
        seed: the run's seed.
        turn: rows of a turn: the batch size if batches are to be of one sequence, else 1.
        key: as in `Shuffled`.
    """

    def __init__(self, sequences: Sequence[RowSequence], seed: int, turn: int = 1, key: tuple[int, ...] = ()):
        self.sequences, self.seed, self.turn, self.key = tuple(sequences), seed, turn, key
        self.share = sum((each.share for each in sequences), Fraction(0))
        denominator = np.lcm.reduce([each.share.denominator for each in sequences], dtype=object) * turn
        self._numerators = [int(each.share * denominator / turn) for each in sequences]
        self._denominator = int(denominator)
        named = hashlib.blake2b(repr((seed, turn, key)).encode(), digest_size=16)
        for each in sequences:
            named.update(each.digest)
        self.digest = named.digest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Interleaved) and self.digest == other.digest

    def row(self, index: int) -> int:
        """See `RowSequence`."""
        epoch = self._epoch(index)
        return int(_cached_rows(self, epoch)[index - self._begin(epoch)])

    def between(self, start: int, stop: int) -> Rows:
        """See `RowSequence`."""
        parts = [np.empty(0, np.int64)]
        epoch, begin = self._epoch(start), self._begin(self._epoch(start))
        while begin < stop:
            rows = self._rows(epoch)
            parts.append(rows[max(0, start - begin) : stop - begin])
            epoch, begin = epoch + 1, begin + len(rows)
        return np.concatenate(parts)

    def _turns_before(self, epoch: int) -> list[int]:
        """Return the turns of each sequence before `epoch`."""
        return [epoch * numerator // self._denominator for numerator in self._numerators]

    def _begin(self, epoch: int) -> int:
        """Return the index at which `epoch` begins."""
        return self.turn * sum(self._turns_before(epoch))

    def _epoch(self, index: int) -> int:
        """Return the epoch that `index` is in."""
        epoch = index // self.turn * self._denominator // sum(self._numerators)  # or somewhat later
        while self._begin(epoch + 1) <= index:
            epoch += 1
        return epoch

    def _labels(self, epoch: int) -> NDArray[np.int64]:
        """Return the sequence that has each turn of `epoch`."""
        before, after = self._turns_before(epoch), self._turns_before(epoch + 1)
        turns = np.repeat(np.arange(len(before)), np.subtract(after, before))
        return keyed_rng(self.seed, Purpose.TURNS, epoch, *self.key).permutation(turns)

    def _rows(self, epoch: int) -> Rows:
        """Return the rows of `epoch`."""
        before, after = self._turns_before(epoch), self._turns_before(epoch + 1)
        labels = self._labels(epoch)
        rows = np.empty((len(labels), self.turn), np.int64)
        for label, sequence in enumerate(self.sequences):
            own = sequence.between(before[label] * self.turn, after[label] * self.turn)
            rows[labels == label] = own.reshape(-1, self.turn)
        return rows.reshape(-1)


def grouped(
    rows: Rows | int,
    labels: NDArray[np.integer] | None,
    seed: int,
    *,
    turn: int = 1,
    key: tuple[int, ...] = (),
    part: Callable[[Rows | int, tuple[int, ...]], RowSequence] | None = None,
) -> RowSequence:
    """Return `rows` interleaved by their labels; with one label, `part(rows, key)` itself.

    Args:
        rows: as in `Shuffled`.
        labels: integers >= 0, one for every row of the source; None if all are alike.
        seed: the run's seed.
        turn: as in `Interleaved`.
        key: as in `Shuffled`.
        part: makes the sequence of one label's rows; by default a `Shuffled`. Nest by another `grouped` in it.
    """
    make = part or (lambda own, own_key: Shuffled(own, seed, own_key))
    if labels is None:
        return make(rows, key)
    own = labels[:rows] if isinstance(rows, int) else labels[rows]
    present = np.unique(own)
    if len(present) == 1:
        return make(rows, key)
    indices = np.arange(rows) if isinstance(rows, int) else rows
    parts = [make(indices[own == label], (*key, int(label) + 1)) for label in present]
    return Interleaved(parts, seed, turn, key)


@lru_cache(maxsize=4)
def _cached_rows(sequence: Interleaved, epoch: int) -> Rows:
    return sequence._rows(epoch)
