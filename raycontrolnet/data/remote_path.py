"""Files and folders in object stores, with the methods of `pathlib.Path` by which data sets are read."""

from __future__ import annotations

import fnmatch
import io
import os
import posixpath
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from raycontrolnet.errors import DataError
from raycontrolnet.storage.store_requests import reached
from raycontrolnet.storage.uri import ACCESS, as_path, check_bucket, is_uri, open_uri, shown_uri
from raycontrolnet.text import error_message

if TYPE_CHECKING:
    import pyarrow as pa

BUFFER_BYTES = 8 * 2**20
"""Bytes of a file that are fetched at a time, if it is read from its beginning to its end."""


class Entry(NamedTuple):
    """A file or folder, with the names of `os.stat_result`."""

    st_mode: int
    st_size: int
    st_mtime_ns: int
    """In whole seconds: stores tell it more or less exactly from one request to the other."""


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder in an object store. Pickled as its name alone; each process opens the store for itself.

    What tells of kinds and sizes lists the folder around a path once in a process: see `forget_listings`.
    """

    root: str
    """URI by which the store is opened; its options are not shown."""
    relative: str = "."
    """Path from there; may lead out of it by `..`."""

    def __str__(self) -> str:
        shown = shown_uri(self.root)
        return shown if self.relative == "." else f"{shown}/{self.relative}"

    def __truediv__(self, path: str) -> RemotePath:
        return RemotePath(self.root, posixpath.normpath(posixpath.join(self.relative, path)))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(str(self)).name

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder of this path, within the root."""
        return RemotePath(self.root, posixpath.dirname(self.relative) or ".")

    def with_suffix(self, suffix: str) -> RemotePath:
        return RemotePath(self.root, str(PurePosixPath(self.relative).with_suffix(suffix)))

    def absolute(self) -> RemotePath:
        return self

    @property
    def key(self) -> str:
        """The path as the store's file system takes it."""
        key = posixpath.normpath(posixpath.join(open_uri(self.root)[1], self.relative))
        if key.startswith(".."):
            raise FileNotFoundError(f"{self}: leads out of the store")
        return "" if key == "." else key

    def stat(self) -> Entry:
        """Return kind, size and time of change.

        Raises:
            FileNotFoundError: if there is no such file or folder.
            OSError: if the store cannot be reached.
        """
        if (entry := self._entry()) is None:
            raise FileNotFoundError(f"{self}: no such file or folder")
        return entry

    def num_bytes(self) -> int | None:
        """Return the size; None if there is no such file or folder."""
        with suppress(FileNotFoundError):
            return self.stat().st_size
        return None

    def exists(self) -> bool:
        return self._entry() is not None

    def is_file(self) -> bool:
        return (entry := self._entry()) is not None and stat.S_ISREG(entry.st_mode)

    def is_dir(self) -> bool:
        return (entry := self._entry()) is not None and stat.S_ISDIR(entry.st_mode)

    def entries(self) -> Mapping[str, Entry]:
        """Return name -> entry of all in this folder; empty if there is no such folder."""
        return _listing(self.root, self.key) or {}

    def iterdir(self) -> Iterator[RemotePath]:
        return (self / name for name in self.entries())

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Yield what fits `pattern`, such as `*/*.parquet`; `*` stands for what is not hidden, within a folder."""
        first, _, rest = pattern.partition("/")
        for name, entry in self.entries().items():
            if fnmatch.fnmatchcase(name, first) and not name.startswith("."):
                if not rest:
                    yield self / name
                elif stat.S_ISDIR(entry.st_mode):
                    yield from (self / name).glob(rest)

    def open_file(self) -> RemoteFile:
        """Open the file to be read in parts.

        Raises:
            OSError: if it cannot be read; a FileNotFoundError if it is not there.
        """
        return RemoteFile(self)

    def open(self, mode: str = "rb", buffering: int = BUFFER_BYTES) -> io.BufferedReader:
        """Open the file as `Path.open` does, for bytes; `buffering` are fetched at a time."""
        assert mode == "rb"
        return io.BufferedReader(_Stream(self.open_file()), buffering)

    def read_bytes(self) -> bytes:
        file = self.open_file()
        return file.read(file.size, 0)

    def read_text(self, encoding: str) -> str:
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding).read()

    def _entry(self) -> Entry | None:
        system, top = reached(lambda: open_uri(self.root))
        key = self.key
        if key == top:
            return _entry_of(reached(lambda: system.get_file_info(key), ()))
        return (_listing(self.root, posixpath.dirname(key)) or {}).get(posixpath.basename(key))


AnyPath = Path | RemotePath


class RemoteFile:
    """A file in a store, for any number of threads."""

    def __init__(self, path: RemotePath):
        self.path = path
        self._file: pa.NativeFile | None = None
        self.size: int = reached(lambda: self._open().size())
        """Bytes."""

    def read(self, size: int, offset: int) -> bytes:
        """Return `size` bytes from `offset`, or as many as there are."""

        def attempt() -> bytes:
            try:
                return bytes(self._open().read_at(size, offset))
            except OSError:
                self._file = None  # opening it again tells why
                raise

        return reached(attempt)

    def version(self) -> tuple[int, int] | None:
        """Return size and time of change, by a request of its own; None if it is gone."""
        system, key = open_uri(self.path.root)[0], self.path.key
        entry = _entry_of(reached(lambda: system.get_file_info(key)))
        return entry and (entry.st_size, entry.st_mtime_ns)

    def _open(self) -> pa.NativeFile:
        if (file := self._file) is None:
            file = self._file = open_uri(self.path.root)[0].open_input_file(self.path.key)
        return file


class _Stream(io.RawIOBase):
    """A `RemoteFile` as Python's readers take it."""

    def __init__(self, file: RemoteFile):
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._file.size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._file.size - self._place)
        block = self._file.read(size, self._place) if size > 0 else b""
        buffer[: len(block)] = block
        self._place += len(block)
        return len(block)


def data_path(name: str) -> AnyPath:
    """Return the path of a file or folder that a setting names by a path or URI."""
    return RemotePath(name) if is_uri(name) else Path(as_path(name))


def joined(root: str | RemotePath, path: str) -> AnyPath:
    """Return `path`, relative to `root` or absolute: absolute paths are those of this machine."""
    return Path(root, path) if isinstance(root, str) else Path(path) if path.startswith("/") else root / path


def listed(folder: AnyPath) -> list[AnyPath]:
    """Return what is in a folder, by name."""
    entries: list[AnyPath] = [*folder.iterdir()]
    return sorted(entries, key=lambda entry: entry.name)


def check_uri(uri: str) -> None:
    """Check that a store can be read: its kind, the keys for it, and its bucket.

    Raises:
        OSError: if not.
    """
    forget_listings()
    path = RemotePath(uri)
    if not (path.exists() and path.key):  # keys may be for one folder of a bucket alone
        reached(lambda: check_bucket(uri), ())


def forget_listings() -> None:
    """Let folders be listed anew."""
    _listing.cache_clear()


@lru_cache(maxsize=4096)
def _listing(root: str, folder: str) -> Mapping[str, Entry] | None:
    """Return name -> entry of a folder; None if there is no such folder. One request for a thousand files."""
    from pyarrow import fs

    with suppress(FileNotFoundError, NotADirectoryError):
        found = reached(lambda: open_uri(root)[0].get_file_info(fs.FileSelector(folder)))
        return {info.base_name: entry for info in found if (entry := _entry_of(info)) is not None}
    return None


def _entry_of(info: Any) -> Entry | None:
    from pyarrow.fs import FileType

    modes = {FileType.File: stat.S_IFREG, FileType.Directory: stat.S_IFDIR, FileType.Unknown: stat.S_IFCHR}
    if info.type == FileType.NotFound:
        return None
    seconds = (info.mtime_ns or 0) // 10**9
    return Entry(modes[info.type], info.size or 0, seconds * 10**9)


def unreadable(path: AnyPath, error: OSError) -> DataError:
    """Return the error for a file of a data set that cannot be read."""
    advice = f"; {ACCESS}" if isinstance(path, RemotePath) else ""
    return DataError(f"{path}: cannot be read ({error_message(error)}){advice}")
