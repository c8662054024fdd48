"""Reading a part of a file, so that many threads and processes can share it."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import lru_cache

OPEN_FILES = 64
"""Files that a process keeps open."""


def read_range(path: str, offset: int, size: int, version: int) -> bytes:
    """Return `size` bytes of a file from `offset`.

    Args:
        version: tells the file from an earlier one of the same name, which may still be open.

    Raises:
        OSError: if it cannot be read.
        EOFError: if it ends before.
    """
    file, blocks = _open(path, version), []
    while size > 0:
        if not (block := os.pread(file.descriptor, size, offset)):
            raise EOFError("the file ends before it: it has changed since the run was started")
        blocks.append(block)
        offset, size = offset + len(block), size - len(block)
    return b"".join(blocks)


def close_files() -> None:
    """Close what is open, once nobody reads it."""
    _open.cache_clear()


class _OpenFile:
    """A file that is closed with the last thread that reads it."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            os.close(self.descriptor)


@lru_cache(OPEN_FILES)
def _open(path: str, version: int) -> _OpenFile:
    return _OpenFile(path)
