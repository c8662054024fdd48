"""The form of all sources of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from raycontrolnet.data.records import ImageRow


class Source(Protocol):
    """Rows that can be read in any order, on any machine that sees the same files. Pickles small, or without a copy."""

    @property
    def remote(self) -> bool:
        """True if rows are read over the network: slow one by one, so many at a time."""
        ...

    def __len__(self) -> int:
        """Return the number of rows; opens nothing."""

    def read(self, row: int) -> ImageRow:
        """Return row 0 <= `row` < len, its images still encoded; the same on every call and machine.

        Raises:
            DataError: naming the row, if it cannot be used.
        """

    def problems(self) -> Iterator[str]:
        """Yield what keeps rows from being read on this machine, as far as can be seen without opening images."""

    def files(self, row: int) -> tuple[str, ...]:
        """Return the absolute paths of the files that `row` is read from; none if every machine fetches its own."""

    def fingerprint(self) -> str:
        """Return a short hash of the data, not of its place, for the checkpoints' manifests."""

    def identities(self, rows: Sequence[int]) -> Iterator[str]:
        """Yield a line of text per row by which the latent cache notices changes: file names, bytes and captions.

        It is a JSON list whose last item is the caption or the list of captions.

        Reads no images: an image that was replaced by one of exactly its size is not noticed.
        """
