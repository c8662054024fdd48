"""The rows that samples are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from raycontrolnet.data.augmentation import CENTRED, View
from raycontrolnet.data.buckets import Buckets
from raycontrolnet.data.records import DecodedRow, EncodedRow
from raycontrolnet.data.source import Source
from raycontrolnet.data.transforms import prepare_images


class SampleRows(Protocol):
    """Rows that samples are made of: `PixelRows`, or a `LatentCache`."""

    @property
    def remote(self) -> bool:
        """True if rows are read over the network: slow one by one, so many at a time."""
        ...

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on its way to a worker, on average."""
        ...

    def read(self, row: int, view: View) -> DecodedRow | EncodedRow:
        """Return the source's row `row`, seen by `view` unless it is encoded.

        Raises:
            DataError: if it cannot be used; names it.
        """
        ...


@dataclass(frozen=True)
class PixelRows:
    """Rows whose images are decoded and transformed for every use."""

    source: Source
    resolution: int
    interpolation: str = "bilinear"
    buckets: Buckets | None = None

    @property
    def remote(self) -> bool:
        return self.source.remote

    @property
    def row_bytes(self) -> int:
        return 2 * 3 * (self.buckets.most_pixels if self.buckets else self.resolution**2)

    def read(self, row: int, view: View = CENTRED) -> DecodedRow:
        size = self.buckets.size_of(row) if self.buckets else self.resolution
        return prepare_images(self.source.read(row), size, self.interpolation, view)
