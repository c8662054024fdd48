"""Files that others read while they are written: whole, or as they were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """Gives a path to write to, beside `path`; what was written there takes the place of `path` at the end.

    If writing fails, as on a full disk, what was there before stays, and nothing is left of the new one. A file is to
    have one writer at a time.

    Args:
        sync: see `synced`.
    """
    partial = path.with_name(f".{path.name.lstrip('.')}.partial")
    try:
        yield partial
        if sync:
            synced(partial)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def synced(path: Path) -> None:
    """Flush a file or folder to the disk, so that a power cut cannot leave what was written later without it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
