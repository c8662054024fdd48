"""Bundles: a worker's batches for a few micro-steps, which travel through Ray Data as one block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raycontrolnet.data.records import PreparedRow
from raycontrolnet.errors import DataError, UserError

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


Bundle = Sequence[list[PreparedRow] | UserError]
"""Batches of one size; an error stands for a batch that could not be made."""


def pack(bundle: Bundle) -> pa.Table:
    """Return a bundle as a table of one row, which Ray Data moves as one block and cannot split."""
    rows = [row for batch in bundle if not isinstance(batch, UserError) for row in batch]
    values: dict[str, Any] = {
        "errors": [str(batch) if isinstance(batch, UserError) else None for batch in bundle],
        "sample_indices": [row.sample_index for row in rows],
        "prompts": [row.prompt for row in rows],
    }
    for name in ("image", "conditioning_image", "posterior"):
        if rows and getattr(rows[0], name) is not None:
            array = np.stack([getattr(row, name) for row in rows])
            values[name] = {"data": array.data, "shape": array.shape, "dtype": array.dtype.name}
    return pa.table({name: [values.get(name)] for name in _SCHEMA.names}, schema=_SCHEMA)


def unpack(table: pa.Table) -> Iterator[list[PreparedRow]]:
    """Yield the batches that `pack` put into `table`; their images are views of the table's memory.

    Raises:
        DataError: in the place of a batch that could not be made.
    """
    errors, indices, prompts = (table[name][0].as_py() for name in ("errors", "sample_indices", "prompts"))
    images, conditioning_images, posteriors = (
        _array(table[name][0]) for name in ("image", "conditioning_image", "posterior")
    )
    batch_size = len(indices) // max(1, errors.count(None))
    start = 0
    for error in errors:
        if error is not None:
            raise DataError(error)
        yield [
            PreparedRow(
                sample_index=indices[index],
                image=None if images is None else images[index],
                conditioning_image=conditioning_images[index],
                prompt=prompts[index],
                posterior=None if posteriors is None else posteriors[index],
            )
            for index in range(start, start + batch_size)
        ]
        start += batch_size


def _array(cell: pa.StructScalar) -> Any:
    """Return the array in a cell, without a copy; None from an empty cell."""
    if not cell.is_valid:
        return None
    data = np.frombuffer(cell["data"].as_buffer(), np.dtype(cell["dtype"].as_py()))
    return data.reshape(cell["shape"].as_py())


_ARRAY = pa.struct({"data": pa.large_binary(), "shape": pa.list_(pa.int64()), "dtype": pa.string()})
_SCHEMA = pa.schema(
    {
        "errors": pa.list_(pa.string()),
        "sample_indices": pa.list_(pa.int64()),
        "prompts": pa.list_(pa.string()),
        "image": _ARRAY,
        "conditioning_image": _ARRAY,
        "posterior": _ARRAY,
    }
)
