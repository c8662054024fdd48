"""The folder that `raycontrolnet condition` writes: what is there of which picture, so that no work is done twice.

    conditioning/a.jpg.png   of the picture a.jpg: the name tells a.jpg from a.png
    metadata.jsonl           the data set, written last
    .condition.jsonl         the journal: what was made, of what, and what of the rest is this command's own

A name is in the journal before its file is made, and with its key once the file is whole. So a file that the journal
does not know is somebody else's, and one without key is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from raycontrolnet.storage.folder import CacheFolder

CONDITIONING = "conditioning"
METADATA = "metadata.jsonl"
JOURNAL = ".condition.jsonl"
ELSEWHERE = "elsewhere"
"""Where the conditioning images of pictures outside their folder go."""


class Made(NamedTuple):
    """A conditioning image that is there."""

    key: str
    """Of the recipe and the picture's state; empty if it was begun and may not be whole."""
    num_bytes: int


class ConditionFolder:
    """The journal of a folder, and where its files lie."""

    def __init__(self, path: Path):
        self.path = path
        self.made: dict[str, Made] = {}
        self._metadata_hashes: set[str] = set()
        self._read()

    @property
    def conditioning(self) -> Path:
        return self.path / CONDITIONING

    @property
    def metadata(self) -> Path:
        return self.path / METADATA

    def is_there(self, name: str, key: str) -> bool:
        """Whether the conditioning image `name` is there and was made with `key`; edited since, it stays as it is."""
        made = self.made.get(name)
        return made is not None and made.key == key and _num_bytes(self.conditioning / name) is not None

    def holds(self, name: str, made: Made) -> bool:
        """Whether the file is there, with the size that it should have."""
        return _num_bytes(self.conditioning / name) == made.num_bytes

    def foreign_files(self, keys: Mapping[str, str]) -> Iterator[Path]:
        """Files that would be overwritten and are not this command's, or not any more.

        Args:
            keys: name -> key of the conditioning images that are wanted.
        """
        if self.metadata.exists() and not self.wrote(self.metadata):
            yield self.metadata
        if self.conditioning.exists():
            for name, key in keys.items():
                made, num_bytes = self.made.get(name), _num_bytes(self.conditioning / name)
                edited = made is not None and made.key not in ("", key) and made.num_bytes != num_bytes
                if num_bytes is not None and (made is None or edited):
                    yield self.conditioning / name

    def wrote(self, metadata: Path) -> bool:
        """Whether a metadata file of this folder is as this command wrote it."""
        try:
            return metadata.name == METADATA and _digest(metadata.read_bytes()) in self._metadata_hashes
        except OSError:
            return False

    def begin(self, names: Iterable[str]) -> None:
        """Put down that these are to be made.

        Raises:
            OSError: if it cannot be written.
        """
        self.made |= dict.fromkeys(names, Made("", 0))
        lines = [_line(metadata=digest) for digest in sorted(self._metadata_hashes)]
        lines += [_line(name=name, key=made.key, num_bytes=made.num_bytes) for name, made in self.made.items()]
        CacheFolder(str(self.path)).write(JOURNAL, "".join(lines).encode())

    def add(self, made: Mapping[str, Made]) -> None:
        """Put down that these are there, whole.

        Raises:
            OSError: if it cannot be written.
        """
        self.made |= made
        self._append("".join(_line(name=name, **done._asdict()) for name, done in made.items()))

    def write_metadata(self, rows: Iterable[Mapping[str, object]]) -> bool:
        """Put the metadata file in its place, whole; False if it is there as it should be.

        Raises:
            OSError: if it cannot be written.
        """
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        digest = _digest(content)
        if self.metadata.is_file() and self.metadata.read_bytes() == content:
            return False
        self._append(_line(metadata=digest))  # first: a file that is not known to be ours could not be replaced again
        self._metadata_hashes.add(digest)
        CacheFolder(str(self.path)).write(METADATA, content)
        return True

    def remove_leftovers(self) -> None:
        """Take away what killed processes left unfinished."""
        for folder in {self.path, *((self.conditioning / name).parent for name in self.made)}:
            CacheFolder(str(folder)).remove_leftovers()

    def _append(self, lines: str) -> None:
        with (self.path / JOURNAL).open("a", encoding="utf-8") as file:
            file.write("\n" + lines)  # what is there may end in half a line

    def _read(self) -> None:
        try:
            lines = (self.path / JOURNAL).read_bytes().splitlines()
        except OSError:
            return
        for line in lines:
            try:
                entry = json.loads(line)
                if "metadata" in entry:
                    self._metadata_hashes.add(entry["metadata"])
                else:
                    self.made[entry["name"]] = Made(entry["key"], entry["num_bytes"])
            except (ValueError, KeyError, TypeError):  # none, or half a line: the process was killed
                continue


def png_name(picture: str, folder: Path) -> str:
    """The name, below `conditioning`, for a picture at an absolute path: its own, so that no two share one."""
    own = Path(os.path.relpath(picture, folder)).as_posix()
    if own.startswith("../"):
        own = f"{ELSEWHERE}/{hashlib.sha256(os.fsencode(picture)).hexdigest()[:8]}-{Path(picture).name}"
    return f"{own}.png"


def _line(**values: object) -> str:
    return json.dumps(values) + "\n"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _num_bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
