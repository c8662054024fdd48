"""The row of the k-th sample of a run, and the random numbers that belong to it.

Everything here is a function of (seed, k). There is no sampler state: a resumed run starts at k, and the number of
workers, restarts or loading tasks cannot change what is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from raycontrolnet.data.interleaved import RowSequence


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
        arrange: Callable[[NDArray[np.int64] | int], RowSequence] | None = None,
    ):
        self.seed = seed
        end = num_rows if max_samples is None else min(num_rows, num_held_out + max_samples)
        self.held_out: NDArray[np.int64] = np.empty(0, np.int64)
        """Rows that are held out."""
        self.rows: NDArray[np.int64] | None = None
        """Rows that are trained on, in the order that permutations count; None for all of them."""
        if num_held_out or end < num_rows:
            drawn = _permutation(seed, Purpose.SUBSET, 0, num_rows)
            self.held_out, self.rows = drawn[:num_held_out], drawn[num_held_out:end]
        if without:
            rows = np.arange(num_rows) if self.rows is None else self.rows
            self.rows = rows[~np.isin(rows, list(without))]
            self.held_out = self.held_out[~np.isin(self.held_out, list(without))]
        self.num_samples = num_rows if self.rows is None else len(self.rows)
        """N, samples per epoch."""
        self.sequence = arrange(num_rows if self.rows is None else self.rows) if arrange else None

    def row(self, sample_index: int) -> int:
        """Return the source's row for sample k = `sample_index`."""
        if self.sequence is not None:
            return self.sequence.row(sample_index)
        epoch, position = divmod(sample_index, self.num_samples)
        place = int(_permutation(self.seed, Purpose.ORDER, epoch, self.num_samples)[position])
        return place if self.rows is None else int(self.rows[place])


@lru_cache(maxsize=4)  # a batch may straddle two epochs
def _permutation(seed: int, purpose: Purpose, key: int, size: int) -> NDArray[np.int64]:
    return keyed_rng(seed, purpose, key).permutation(size)
