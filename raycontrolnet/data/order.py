"""The row of the k-th sample of a run, and the random numbers that belong to it.

Everything here is a function of (seed, k). There is no sampler state: a resumed run starts at k, and the number of
workers, restarts or loading tasks cannot change what is learned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from enum import IntEnum
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """Use of a random stream: streams of one seed and different purposes are independent."""

    SUBSET = 0
    ORDER = 1
    PROMPT = 2
    DIFFUSION = 3
    CONTROLNET = 4
    HELD_OUT = 5
    HELD_OUT_PROMPT = 6
    TURNS = 7
    AUGMENTATION = 8


def keyed_rng(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """Return the generator of `(seed, purpose, key)`; it costs tens of microseconds, and every sample has its own.

    A zero at the end of a key of several numbers changes nothing.
    """
    return np.random.default_rng((seed, purpose, *key))


def keyed_seed(seed: int, purpose: Purpose, key: int) -> int:
    """Return a 63-bit seed for `torch.Generator.manual_seed`, from `(seed, purpose, key)`."""
    return int(np.random.SeedSequence((seed, purpose, key)).generate_state(1, np.uint64)[0] >> np.uint64(1))


Rows = NDArray[np.int64]


class RowSequence(Protocol):
    """An endless sequence of rows. Pickles small, or without a copy."""

    @property
    def share(self) -> Fraction:
        """Rows per epoch of what it is a part of; for `Shuffled` its rows x `repeats`."""
        ...

    @property
    def digest(self) -> bytes:
        """Hash of everything that decides the sequence."""
        ...

    def row(self, index: int) -> int:
        """Return the row at `index` >= 0, in constant time on average over an epoch."""
        ...

    def between(self, start: int, stop: int) -> Rows:
        """Return the rows at [start, stop), int64."""
        ...


class Shuffled:
    """A permutation of `rows` for every epoch, from (seed, key, epoch).

    Args:
        rows: int64, in the order that permutations count; or their number n, for 0 to n - 1. At least one.
        seed: the run's seed.
        key: numbers above 0 that tell it from the other sequences of the run; none for the only one.
        repeats: uses of each row per epoch of what it is a part of, on average.
    """

    def __init__(self, rows: Rows | int, seed: int, key: tuple[int, ...] = (), repeats: Fraction = Fraction(1)):
        self.rows, self.seed, self.key, self.repeats = rows, seed, key, repeats
        self.size = rows if isinstance(rows, int) else len(rows)

    @cached_property
    def digest(self) -> bytes:
        """See `RowSequence`."""
        named = hashlib.blake2b(repr((self.size, self.seed, self.key, self.repeats)).encode(), digest_size=16)
        if not isinstance(self.rows, int):
            named.update(np.ascontiguousarray(self.rows).data)
        return named.digest()

    @property
    def share(self) -> Fraction:
        return self.size * self.repeats

    def row(self, index: int) -> int:
        """See `RowSequence`."""
        epoch, position = divmod(index, self.size)
        place = int(_cached_permutation(self.seed, self.key, epoch, self.size)[position])
        return place if isinstance(self.rows, int) else int(self.rows[place])

    def between(self, start: int, stop: int) -> Rows:
        """See `RowSequence`."""
        first, parts = start // self.size, [np.empty(0, np.int64)]
        for epoch in range(first, -(-stop // self.size)):
            places = _permutation(self.seed, self.key, epoch, self.size)
            begin = epoch * self.size
            parts.append(places[max(0, start - begin) : stop - begin])
        places = np.concatenate(parts)
        return places if isinstance(self.rows, int) else self.rows[places]


class SampleOrder:
    """k -> row: a permutation of the rows for every epoch, from (seed, epoch) alone.

    Args:
        num_rows: rows of the source, at least 1.
        seed: the run's seed.
        max_samples: size of the random subset that is used, if there are more rows.
        without: rows that cannot be used; the others keep their order in the subset.
        num_held_out: rows, drawn by the seed, that are never trained on.
        arrange: gives the rows that are trained on (an array, or their number for all of them) another order, such as
            `grouped` does.
    """

    def __init__(
        self,
        num_rows: int,
        seed: int,
        max_samples: int | None = None,
        without: Sequence[int] = (),
        num_held_out: int = 0,
        arrange: Callable[[Rows | int], RowSequence] | None = None,
    ):
        self.seed = seed
        end = num_rows if max_samples is None else min(num_rows, num_held_out + max_samples)
        self.held_out: Rows = np.empty(0, np.int64)
        """Rows that are held out."""
        self.rows: Rows | None = None
        """Rows that are trained on, in the order that permutations count; None for all of them."""
        if num_held_out or end < num_rows:
            drawn = keyed_rng(seed, Purpose.SUBSET, 0).permutation(num_rows)
            self.held_out, self.rows = drawn[:num_held_out], drawn[num_held_out:end]
        if without:
            rows = np.arange(num_rows) if self.rows is None else self.rows
            self.rows = rows[~np.isin(rows, list(without))]
            self.held_out = self.held_out[~np.isin(self.held_out, list(without))]
        trained = num_rows if self.rows is None else self.rows
        self.num_samples = trained if isinstance(trained, int) else len(trained)
        """N, samples per epoch."""
        self._sequence = arrange(trained) if arrange else Shuffled(trained, seed)

    def row(self, sample_index: int) -> int:
        """Return the source's row for sample k = `sample_index`."""
        return self._sequence.row(sample_index)


def _permutation(seed: int, key: tuple[int, ...], epoch: int, size: int) -> Rows:
    return keyed_rng(seed, Purpose.ORDER, epoch, *key).permutation(size)


_cached_permutation = lru_cache(maxsize=4)(_permutation)  # a batch may straddle two epochs
