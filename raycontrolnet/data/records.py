"""The records of the data path, from a row on disk to a batch in the worker: dtype, shape and range of each.

ImageRow -> PreparedRow -> (a block of B prepared rows through Ray Data) -> model.step.Batch on the device
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UInt8Image = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageRow:
    """One row as its source holds it, not decoded."""

    image: bytes | str
    """Encoded image file (png, jpeg, ...) as bytes, or the path of one."""
    conditioning_image: bytes | str
    """The same for the conditioning image."""
    captions: tuple[str, ...]
    """At least one; one of them is drawn for every use."""
    place: str
    """Where the row comes from, for messages: a file and line, or a data set and row."""


@dataclass(frozen=True)
class PreparedRow:
    """One sample after the transforms, ready to be stacked. Still uint8: a quarter of the bytes of float32."""

    sample_index: int
    """k: this is the k-th sample that the run consumes, counted from 0 over all epochs."""
    image: UInt8Image
    """[resolution, resolution, 3] RGB."""
    conditioning_image: UInt8Image
    """[resolution, resolution, 3] RGB."""
    prompt: str
    """The caption drawn for this use, or the empty prompt."""

    @staticmethod
    def fake(sample_index: int = 0, resolution: int = 16) -> PreparedRow:
        """A valid record with made-up content, for tests."""
        rng = np.random.default_rng(sample_index)
        image, conditioning_image = rng.integers(0, 256, (2, resolution, resolution, 3), dtype=np.uint8)
        return PreparedRow(sample_index, image, conditioning_image, f"prompt {sample_index}")
