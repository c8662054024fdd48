"""Several sources as one."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

from raycontrolnet.data.records import ImageRow
from raycontrolnet.data.source import Source


@dataclass(frozen=True)
class JoinedSource:
    """The rows of `parts`, one after the other; see `Source` for the methods."""

    parts: tuple[Source, ...]
    named: bool = False
    """True if the settings name each part, false for the folders in a folder."""

    @property
    def remote(self) -> bool:
        return any(part.remote for part in self.parts)

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, row: int) -> ImageRow:
        """Return row 0 <= `row` < len.

        Raises:
            DataError: if the row cannot be used.
        """
        part, own = self._part(row)
        return self.parts[part].read(own)

    def problems(self) -> Iterator[str]:
        """Yield the problems of all parts."""
        for part in self.parts:
            yield from part.problems()

    def files(self, row: int) -> tuple[str, ...]:
        """Return the paths of the files that the row is read from."""
        part, own = self._part(row)
        return self.parts[part].files(own)

    def fingerprint(self) -> str:
        """Return a hash of those of the parts."""
        return hashlib.sha256("".join(part.fingerprint() for part in self.parts).encode()).hexdigest()[:16]

    def identities(self, rows: Sequence[int]) -> Iterator[str]:
        """See `Source.identities`. Files of one name in two folders differ by their place among the rows."""
        for part, places in groupby(map(self._part, rows), key=lambda place: place[0]):
            yield from self.parts[part].identities([own for _, own in places])

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        return tuple(accumulate(len(part) for part in self.parts))

    def _part(self, row: int) -> tuple[int, int]:
        """Return (index of the part, row in it)."""
        part = bisect_right(self._ends, row)
        return part, row - (self._ends[part - 1] if part else 0)


def named_sources(source: Source) -> tuple[Source, ...]:
    """Return the sources that were named one by one; a single one as it is."""
    return source.parts if isinstance(source, JoinedSource) and source.named else (source,)
