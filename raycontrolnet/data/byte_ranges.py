"""Reading a part of a file, so that many threads and processes can share it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

from raycontrolnet.data.remote_path import RemoteFile, RemotePath

Version = tuple[int, int]
"""Bytes of a file, and when it was changed."""
OPEN_FILES = 64
"""Files that a process keeps open."""
LARGEST_GAP = 2**16
"""Bytes between the files of a sample that may be read in vain, to save a request."""


def read_range(path: str | RemotePath, offset: int, size: int, version: Version) -> bytes:
    """Return `size` bytes of a file from `offset`.

    Args:
        version: tells the file from an earlier one of the same name, which may still be open.

    Raises:
        OSError: if it cannot be read.
        EOFError: if it ends before, or is another one by now.
    """
    file, blocks = _open(path, version), []
    while size > 0:
        if not (block := file.read(size, offset)):
            raise EOFError("the file ends before it: it has changed since the run was started")
        blocks.append(block)
        offset, size = offset + len(block), size - len(block)
    return b"".join(blocks)


def read_ranges(path: str | RemotePath, ranges: Sequence[tuple[int, int]], version: Version) -> list[bytes]:
    """Return the bytes of several (offset, size); see `read_range`. Those that lie close together are read at once."""
    start, end = min(offset for offset, _ in ranges), max(offset + size for offset, size in ranges)
    if end - start > sum(size for _, size in ranges) + LARGEST_GAP:
        return [read_range(path, offset, size, version) for offset, size in ranges]
    block = read_range(path, start, end - start, version)
    return [block[offset - start : offset - start + size] for offset, size in ranges]


def close_files() -> None:
    """Close what is open, once nobody reads it."""
    _open.cache_clear()


class _OpenFile:
    """A file that is closed with the last thread that reads it."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self.descriptor, size, offset)

    def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            os.close(self.descriptor)


@lru_cache(OPEN_FILES)
def _open(path: str | RemotePath, version: Version) -> _OpenFile | RemoteFile:
    if not isinstance(path, RemotePath):
        return _OpenFile(path)
    file = path.open_file()
    if file.version() != version:
        raise EOFError("it has changed since the run was started")
    return file
