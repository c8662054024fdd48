"""Files that others read while they are written: whole, or as they were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Gives a path to write to, beside `path`; what was written there takes the place of `path` at the end.

    If writing fails, as on a full disk, what was there before stays, and nothing is left of the new one.

    Args:
        sync: wait until it is on the disk, so that it outlives a machine that loses its power.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        if sync:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
