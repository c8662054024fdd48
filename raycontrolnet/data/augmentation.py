"""Paired augmentation: the crop and the mirroring of a sample's two images, by the same numbers.

The view of the k-th sample is a function of (seed, k), as all that is drawn. Held-out rows have the plain view.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from raycontrolnet.data.order import Purpose, keyed_rng

RANDOM = "random"


class View(NamedTuple):
    """One way to see both images of a row."""

    top: float = 0.5
    """Share of the room for the crop that is left above it, in [0, 1]: 0.5 is the centre."""
    left: float = 0.5
    """The same to its left, before it is mirrored."""
    flipped: bool = False
    """True if the crop is mirrored, left to right."""


CENTRED = View()
_PLAIN = {"center": CENTRED, "top": View(top=0.0), RANDOM: CENTRED}


@dataclass(frozen=True)
class Augmentation:
    """The rule by which samples get their views."""

    crop: str = "center"
    """One of `CROPS`."""
    random_flip: bool = False

    @property
    def plain(self) -> View:
        """View of rows that are not augmented, as the held-out ones: not mirrored, the centre if crops are random."""
        return _PLAIN[self.crop]

    def view(self, seed: int, sample_index: int) -> View:
        """Return the view of sample k = `sample_index`: a function of (seed, k).

        All three numbers are always drawn: crops do not change which samples are mirrored, nor the other way round.
        """
        if not self.random_flip and self.crop != RANDOM:
            return self.plain
        flipped, top, left = keyed_rng(seed, Purpose.AUGMENTATION, sample_index).random(3).tolist()
        if self.crop != RANDOM:
            top, left, _ = self.plain
        return View(top, left, self.random_flip and flipped < 0.5)

    def fixed_view(self, identity: str) -> View:
        """Return the view that the latent cache stores of a row, which it also stores mirrored.

        A random crop follows from the row's identity, which names the row in the cache: so caches of equal data are
        equal, whatever the seed and wherever the row stands.
        """
        if self.crop != RANDOM:
            return self.plain
        key = int.from_bytes(hashlib.blake2b(identity.encode(), digest_size=8).digest(), "big")
        top, left = np.random.default_rng((Purpose.AUGMENTATION, key)).random(2).tolist()
        return View(top, left)


NONE = Augmentation()
"""The centre of every image."""
