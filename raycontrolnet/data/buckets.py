"""Aspect buckets: sizes of about the same area, so that each image is brought to one of nearly its own shape.

Images of one bucket have one size, and a batch is of one bucket (`interleaved` makes such an order). Both images of a
row are resized and cropped to the size of its bucket.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raycontrolnet.data.records import Size
from raycontrolnet.text import counted

LARGEST_STEP = 64
"""Widths and heights are multiples of this, or of a quarter of the resolution where that is less."""
NOT_USED = -1
Sizes = NDArray[np.int32]
"""[N, 2]: height and width of the image of each row, upright."""


def bucket_sizes(resolution: int, multiple: int = 8) -> tuple[Size, ...]:
    """Return the sizes that images may be brought to, from the highest to the widest.

    Sides are from half the resolution to twice it. No area is above that of the resolution squared, which bounds the
    memory of a step. The square itself is always among them.

    Args:
        multiple: number by which the base model's family needs sides to be divisible.
    """
    step = multiple * max(1, min(LARGEST_STEP, resolution // 4) // multiple)
    sizes = {(resolution, resolution)}
    for short in range(-(-resolution // 2 // step) * step, resolution, step):
        long = resolution**2 // short // step * step
        if long > short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes, key=_shape))


@dataclass(frozen=True, eq=False)
class Buckets:
    """The sizes of a run, and the one of each row. Pickles without a copy."""

    sizes: tuple[Size, ...]
    """From the highest to the widest."""
    of_row: NDArray[np.int16]
    """[N]: index in `sizes` for each row of the source; `NOT_USED` for rows that the run does not use."""
    num_rows: tuple[int, ...]
    """Rows of each bucket that are trained on."""
    kept: tuple[float, ...]
    """Share of these rows' pixels that the crop leaves."""
    notes: tuple[str, ...] = ()
    """Buckets that were merged, in words."""

    @staticmethod
    def of(
        image_sizes: Sizes,
        trained: NDArray[np.int64],
        others: NDArray[np.int64],
        batch_size: int,
        sizes: Sequence[Size],
    ) -> Buckets:
        """Give each row the size that is nearest to its image's shape.

        A bucket with fewer rows to train on than a batch is left out, the smallest first: its rows go to the nearest of
        those that remain.

        Args:
            image_sizes: of all rows; looked at where the run uses them.
            trained: rows that are trained on, at least one.
            others: rows that the run uses otherwise, such as held-out ones.
            sizes: of `bucket_sizes`.
        """
        shapes = image_sizes[:, 1] / np.maximum(1, image_sizes[:, 0])
        remaining, notes = sorted(sizes, key=_shape), []
        while True:
            own = nearest(shapes[trained], remaining)
            counts = np.bincount(own, minlength=len(remaining))
            smallest = int(counts.argmin())
            if counts[smallest] >= batch_size or len(remaining) == 1:
                break
            size = remaining.pop(smallest)
            if counts[smallest]:
                to = nearest(shapes[trained[own == smallest]], remaining)
                names = " and ".join(in_words(remaining[index]) for index in np.unique(to))
                few = counted(int(counts[smallest]), "row")
                notes.append(f"{in_words(size)} has {few}, fewer than a batch of {batch_size}: merged into {names}")
        of_row = np.full(len(image_sizes), NOT_USED, np.int16)
        for rows in (trained, others):
            of_row[rows] = nearest(shapes[rows], remaining)
        ratios = shapes[trained] / np.array([_shape(size) for size in remaining])[own]
        kept = np.bincount(own, np.minimum(ratios, 1 / ratios), len(remaining)) / np.maximum(1, counts)
        return Buckets(tuple(remaining), of_row, tuple(counts.tolist()), tuple(kept.tolist()), tuple(notes))

    def size_of(self, row: int) -> Size:
        """Return the height and width that the images of a row are brought to."""
        return self.sizes[self.of_row[row]]

    @property
    def largest(self) -> Size:
        """The size with the most pixels."""
        return max(self.sizes, key=lambda size: size[0] * size[1])

    @property
    def most_pixels(self) -> int:
        """Pixels of the largest size."""
        return self.largest[0] * self.largest[1]

    def table(self) -> Iterator[str]:
        """Yield the lines of a table of the buckets."""
        total = sum(self.num_rows)
        kept = sum(rows * share for rows, share in zip(self.num_rows, self.kept, strict=True)) / max(1, total)
        sizes = counted(len(self.sizes), "size")
        yield f"aspect buckets: {counted(total, 'row')} in {sizes}, {kept:.1%} of the pixels kept"
        yield f"  {'width x height':>14}  {'rows':>10}  {'pixels kept':>11}"
        for size, rows, share in zip(self.sizes, self.num_rows, self.kept, strict=True):
            yield f"  {in_words(size):>14}  {rows:>10,}  {share:>11.1%}"
        yield from (f"  {note}" for note in self.notes)


def nearest(shapes: NDArray[np.float64], sizes: Sequence[Size]) -> NDArray[np.int64]:
    """Return for each of `shapes` (width / height) the index of the nearest of `sizes`, by the quotient of the two.

    Args:
        sizes: from the highest to the widest.
    """
    own = np.array([_shape(size) for size in sizes])
    return np.searchsorted(np.sqrt(own[:-1] * own[1:]), shapes)


def nearest_size(image_size: Size, sizes: Sequence[Size]) -> Size:
    """Return the one of `sizes` for an image of this size; `sizes` as for `nearest`."""
    return sizes[int(nearest(np.array([_shape(image_size)]), sizes)[0])]


def in_words(size: Size) -> str:
    """Return width x height."""
    return f"{size[1]} x {size[0]}"


def _shape(size: Size) -> float:
    return size[1] / size[0]
