"""Bundles: a worker's batches for a few micro-steps, which travel through Ray Data as one block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BUNDLE_BYTES = 16 * 2**20
MOST_IN_BUNDLE = 8


def batch_bytes(batch_size: int, resolution: int) -> int:
    """Return the size of a batch's images, two per sample."""
    return batch_size * 2 * 3 * resolution**2


@dataclass(frozen=True)
class StreamLayout:
    """The batches of a stream, and how they come to the workers."""

    first_sample: int
    micro_steps: int
    """Batches of every worker."""
    batch_size: int
    num_workers: int = 1
    """1 also if the number is not known: with a bundle of 1, batches are dealt one by one to any number of workers."""
    bundle: int = 1
    """Batches that travel together to a worker: Ray's work for each block costs tens of ms."""

    @staticmethod
    def bundle_for(batch_bytes: int) -> int:
        """Return how many batches make a block of some megabytes."""
        return min(MOST_IN_BUNDLE, max(1, BUNDLE_BYTES // batch_bytes))

    def bundles(self) -> Iterator[list[int]]:
        """Yield each bundle as the first samples of its batches; bundles are dealt to the workers round robin."""
        for start in range(0, self.micro_steps, self.bundle):
            micro_steps = range(start, min(start + self.bundle, self.micro_steps))
            for rank in range(self.num_workers):
                places = (micro_step * self.num_workers + rank for micro_step in micro_steps)
                yield [self.first_sample + place * self.batch_size for place in places]
