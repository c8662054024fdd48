"""The folder that `raycontrolnet condition` writes, and its journal, so that no image is made twice.

    conditioning/a.jpg.png   of the picture a.jpg: the name tells a.jpg from a.png
    metadata.jsonl           the data set, written last
    .condition.jsonl         the journal: the images that were made, with their keys, and hashes of metadata.jsonl

A name enters the journal before its file is made, and gets its key once the file is complete. So a file that the
journal does not name is foreign, and one without a key is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from raycontrolnet.data.metadata_file import CONDITION_JOURNAL
from raycontrolnet.storage.folder import CacheFolder, writing_to

CONDITIONING = "conditioning"
METADATA = "metadata.jsonl"
BAD_PICTURES_FILE = "condition.bad_pictures.txt"
ELSEWHERE = "elsewhere"
"""Folder for the conditioning images of pictures outside the pictures' folder."""


class Made(NamedTuple):
    """The journal's entry of a conditioning image."""

    key: str
    """Key of the recipe and the picture's state; empty if the image was begun and may not be complete."""
    num_bytes: int


class ConditionFolder:
    """The journal of a folder, and where its files lie."""

    def __init__(self, path: Path):
        self.path, self.conditioning, self.metadata = path, path / CONDITIONING, path / METADATA
        self.made: dict[str, Made] = {}
        self._metadata_hashes: set[str] = set()
        self._read()

    def is_there(self, name: str, key: str) -> bool:
        """Check that the conditioning image `name` exists and was made with `key`. It may have been edited since."""
        made = self.made.get(name)
        return made is not None and made.key == key and _num_bytes(self.conditioning / name) is not None

    def holds(self, name: str, made: Made) -> bool:
        """Check that the file exists and has the size in `made`."""
        return _num_bytes(self.conditioning / name) == made.num_bytes

    def foreign_files(self, keys: Mapping[str, str]) -> Iterator[Path]:
        """Yield files that would be overwritten and that this command did not write, or that were edited since.

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
        """Check that a metadata file of this folder is as this command wrote it."""
        try:
            return metadata.name == METADATA and _digest(metadata.read_bytes()) in self._metadata_hashes
        except OSError:
            return False

    def begin(self, names: Sequence[str]) -> None:
        """Enter images that will be made now, and remove a metadata file that names images which they replace.

        Raises:
            RunError: if the folder cannot be written to.
        """
        self.made |= dict.fromkeys(names, Made("", 0))
        lines = [_line(metadata=digest) for digest in sorted(self._metadata_hashes)]
        lines += [_line(name=name, key=made.key, num_bytes=made.num_bytes) for name, made in self.made.items()]
        with writing_to(str(self.path)):
            CacheFolder(str(self.path)).write(CONDITION_JOURNAL, "".join(lines).encode())
            if any((self.conditioning / name).exists() for name in names):
                self.metadata.unlink(missing_ok=True)

    def add(self, made: Mapping[str, Made]) -> None:
        """Enter images that are complete.

        Raises:
            RunError: if the folder cannot be written to.
        """
        self.made |= made
        with writing_to(str(self.path)):
            self._append("".join(_line(name=name, **done._asdict()) for name, done in made.items()))

    def write_metadata(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Replace the metadata file, unless it has this content already.

        Raises:
            RunError: if the folder cannot be written to.
        """
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if self.metadata.is_file() and self.metadata.read_bytes() == content:
            return
        digest = _digest(content)
        with writing_to(str(self.path)):
            self._append(_line(metadata=digest))  # first: a file that the journal does not know could not be replaced
            self._metadata_hashes.add(digest)
            CacheFolder(str(self.path)).write(METADATA, content)

    def write_bad_pictures(self, reasons: Sequence[str]) -> Path:
        """Write the list of pictures that cannot be used, a reason per line; remove it if there are none.

        Raises:
            RunError: if the folder cannot be written to.
        """
        file = self.path / BAD_PICTURES_FILE
        with writing_to(str(self.path)):
            file.unlink(missing_ok=True)
            if reasons:
                text = "".join(f"{reason}\n" for reason in reasons)
                file.write_text(text, encoding="utf-8", errors="backslashreplace")
        return file

    def remove_leftovers(self) -> None:
        """Remove the partial files of killed processes."""
        for folder in {self.path, *((self.conditioning / name).parent for name in self.made)}:
            CacheFolder(str(folder)).remove_leftovers()

    def _append(self, lines: str) -> None:
        with (self.path / CONDITION_JOURNAL).open("a", encoding="utf-8") as file:
            file.write("\n" + lines)  # the journal may end in half a line

    def _read(self) -> None:
        try:
            lines = (self.path / CONDITION_JOURNAL).read_bytes().splitlines()
        except OSError:
            return
        for line in lines:
            try:
                entry = json.loads(line)
                if "metadata" in entry:
                    self._metadata_hashes.add(entry["metadata"])
                else:
                    self.made[entry["name"]] = Made(entry["key"], entry["num_bytes"])
            except (ValueError, KeyError, TypeError):  # empty, or half a line of a killed process
                continue


def png_name(picture: str, folder: Path) -> str:
    """Return the name, below `conditioning`, for a picture at an absolute path; no two pictures share one."""
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
