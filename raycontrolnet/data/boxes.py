"""Objects on their way through Ray Data: one to a block, errors among them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from raycontrolnet.errors import root_cause


def boxed(item: object) -> pa.Table:
    """A table of one row, so that Ray Data moves the object as one block."""
    return pa.table({"object": pa.array([pickle.dumps(item, protocol=5)], pa.large_binary())})


def unboxed(table: pa.Table) -> Any:
    """The inverse of `boxed`."""
    (cell,) = table["object"]
    return pickle.loads(cell.as_buffer())


def or_error(work: Callable[[Any], object], item: object) -> object:
    """`work(item)`, or the error of this step or of one before: Ray Data's own would hide its cause."""
    if isinstance(item, Exception):
        return item
    try:
        return work(item)
    except Exception as error:  # noqa: BLE001 (the driver raises it)
        return root_cause(error)
