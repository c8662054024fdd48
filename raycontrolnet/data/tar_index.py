"""The files in tar shards: found by the headers alone, and grouped into samples by WebDataset's rule.

0001.jpg    0001.conditioning_image.png    0001.txt: a sample of the key 0001, the name up to the base name's first dot
"""

from __future__ import annotations

import posixpath
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from raycontrolnet.data.metadata_file import METADATA_FILES
from raycontrolnet.data.remote_path import AnyPath, listed
from raycontrolnet.text import counted, error_message

TAR_SUFFIX = ".tar"
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of a compressed file -> the program's name."""
HEADER_BYTES = 2**16
"""Bytes that are fetched of a tar in an object store for a header; the next ones are often among them."""
_LONGEST_END = 2**20
"""Most bytes of zeros at the end of a tar: writers fill up a record, of 10 kB by default."""


class Member(NamedTuple):
    """A file in a tar."""

    extension: str
    """The base name after its first dot, in lower case."""
    offset: int
    size: int
    fault: str = ""
    """Reason why it cannot be read, to follow its extension; empty if it can."""


@dataclass
class ShardIndex:
    """The files of one tar."""

    samples: dict[str, list[Member]] = field(default_factory=dict)
    """Key -> files, as they first come."""
    fault: str = ""
    """Reason why the tar, or its rest, cannot be read; empty if all of it can."""
    metadata_file: str = ""
    """A file by which it is an archive of an ordinary data folder."""


def shard_files(path: AnyPath) -> list[AnyPath]:
    """Return the tars that `path` names, by name: of a folder, or of `train` in it, or itself; compressed ones too."""
    if is_tar(path):
        return [path]
    for folder in (path, path / "train"):
        if folder.is_dir() and (found := [entry for entry in listed(folder) if is_tar(entry)]):
            return found
    return []


def is_tar(path: AnyPath) -> bool:
    """Check whether a regular file has the name of a tar, compressed or not."""
    name = path.name.lower()
    return not name.startswith(".") and name.endswith((TAR_SUFFIX, *COMPRESSED_SUFFIXES)) and path.is_file()


def read_index(path: AnyPath) -> ShardIndex:
    """Return the files in the tar `path`; reads its headers alone, and follows no links."""
    index, whole = ShardIndex(), 0
    tar: tarfile.TarFile | None = None
    try:
        num_bytes = path.stat().st_size
        if fault := _unreadable(path):
            return ShardIndex(fault=fault)
        place, file = (path, None) if isinstance(path, Path) else (None, path.open("rb", HEADER_BYTES))
        with tarfile.open(place, "r:", file, encoding="utf-8", errors="surrogateescape") as tar:
            for entry in _entries(tar):
                is_whole = entry.offset_data + entry.size <= num_bytes
                whole += is_whole and entry.isreg()
                _add(index, entry, is_whole=is_whole)
            index.fault = _fault_at_end(tar, num_bytes, whole)
    except OSError as error:
        index.fault = f"cannot be read ({error_message(error)})"
    except Exception:  # noqa: BLE001 - tarfile raises ValueError, OverflowError and more for broken headers
        if tar is None:
            index.fault = "is not a tar file; copy or write it again"
        else:
            index.fault = _broken(tar.offset, num_bytes, whole)
    return index


def split_name(name: str) -> tuple[str, str] | None:
    """Return key and extension of a file's name in a tar; None if it belongs to no sample: hidden, or without a dot."""
    name = posixpath.normpath(name)
    if name.startswith(".") or "/." in name:  # as macOS's ._1.png
        return None
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}{slash}{stem}", sys.intern(extension.lower())) if extension else None


def extensions_of(shards: Mapping[AnyPath, ShardIndex]) -> dict[str, None]:
    """Return all extensions, as they first come."""
    return {
        member.extension: None for index in shards.values() for members in index.samples.values() for member in members
    }


def _unreadable(path: AnyPath) -> str:
    """Return why a file cannot be a tar that is read, by its first bytes; empty if it can."""
    with path.open("rb", HEADER_BYTES) as file:
        head = file.read(8)
    if not head:
        return "is empty (0 bytes); copy it again"
    program = next((name for first, name in _COMPRESSIONS.items() if head.startswith(first)), None)
    if program or path.name.lower().endswith(COMPRESSED_SUFFIXES):
        how = f"with {program}" if program else "by its name"
        return f"is compressed ({how}), which allows no random access; decompress it to a .tar"
    return ""


def _entries(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    end = 0
    for entry in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # which would hold a million of them
        if entry.size < 0 or tar.offset <= end:
            raise tarfile.ReadError("a negative size")
        end = tar.offset
        yield entry


def _add(index: ShardIndex, entry: tarfile.TarInfo, *, is_whole: bool) -> None:
    # Bytes that are no UTF-8 become half surrogates, which Arrow does not take.
    name = entry.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if entry.isdir() or (found := split_name(name)) is None:
        return
    key, extension = found
    fault = ""
    if entry.issym() or entry.islnk():
        fault = "is a link, which is not followed"
    elif not entry.isreg():
        fault = "is a device or a pipe"
    elif entry.issparse():
        fault = "is stored as a sparse file"
    elif not is_whole:
        fault = "is cut off with the tar"
    index.samples.setdefault(key, []).append(Member(extension, entry.offset_data, entry.size, fault))
    if posixpath.basename(name) in METADATA_FILES:
        index.metadata_file = name


def _fault_at_end(tar: tarfile.TarFile, num_bytes: int, whole: int) -> str:
    """Return why a tar does not end where its files do; tarfile itself takes a broken header for the end."""
    file = tar.fileobj
    assert file is not None
    file.seek(tar.offset)
    rest = num_bytes - tar.offset
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        return _broken(tar.offset, num_bytes, whole)
    if rest > _LONGEST_END or any(file.read(rest)):
        return (
            f"goes on for {rest:,} bytes after its end at byte {tar.offset:,} ({counted(whole, 'file')}): several tars "
            "in one, or a copy that is not whole; write each into its own file, or copy it again"
        )
    return ""


def _broken(offset: int, num_bytes: int, whole: int) -> str:
    """Return how far a tar can be read."""
    where = f"damaged or cut off at byte {offset:,} of" if offset < num_bytes else "cut off, at byte"
    return f"is {where} {num_bytes:,}: {counted(whole, 'file')} can be read; copy or write it again"
