"""Which row the k-th sample of a run is, and the random numbers that belong to it.

Everything here is a function of (seed, k): no sampler state exists, so resuming is starting at k, and the number of
workers, restarts or loading tasks cannot change what is learned.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What a random stream is for: streams of one seed but different purposes are independent."""

    SUBSET = 0
    ORDER = 1
    PROMPT = 2
    DIFFUSION = 3
    CONTROLNET = 4


def keyed_rng(seed: int, purpose: Purpose, key: int) -> np.random.Generator:
    """The generator of `(seed, purpose, key)`; cheap (tens of microseconds), made anew for every sample."""
    return np.random.default_rng((seed, purpose, key))


def keyed_seed(seed: int, purpose: Purpose, key: int) -> int:
    """A 63-bit seed for `torch.Generator.manual_seed`, from `(seed, purpose, key)`."""
    return int(np.random.SeedSequence((seed, purpose, key)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class SampleOrder:
    """k -> row: a fresh permutation of the rows for every epoch, from (seed, epoch) alone.

    Args:
        num_rows: rows of the source, at least 1.
        seed: the run's seed.
        max_samples: if fewer than `num_rows`, only a seeded random subset of this size is used.
    """

    def __init__(self, num_rows: int, seed: int, max_samples: int | None = None):
        self.num_rows = num_rows
        self.seed = seed
        self.num_samples = num_rows if max_samples is None else min(num_rows, max_samples)
        """N, samples per epoch."""

    def row(self, sample_index: int) -> int:
        """The source row of sample k = `sample_index`."""
        epoch, position = divmod(sample_index, self.num_samples)
        position = int(_permutation(self.seed, Purpose.ORDER, epoch, self.num_samples)[position])
        if self.num_samples == self.num_rows:
            return position
        return int(_permutation(self.seed, Purpose.SUBSET, 0, self.num_rows)[position])


@lru_cache(maxsize=4)  # a batch may straddle two epochs; plus the subset's
def _permutation(seed: int, purpose: Purpose, key: int, size: int) -> NDArray[np.int64]:
    return keyed_rng(seed, purpose, key).permutation(size)
