"""A folder of images and texts: with a metadata file that has a row for each, or with files that pair by name."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycontrolnet.config.data_sources import SourceConfig
from raycontrolnet.data.columns import Columns, find_columns, read_captions
from raycontrolnet.data.metadata_file import METADATA_FILES, metadata_rows, read_path, written_by_condition
from raycontrolnet.data.paths import (
    Root,
    file_bytes,
    file_identity,
    is_embedded,
    missing_problems,
    path_or_image,
    shown_path,
)
from raycontrolnet.data.records import EncodedImage, ImageRow
from raycontrolnet.data.remote_path import AnyPath, RemotePath, joined, unreadable
from raycontrolnet.errors import DataError
from raycontrolnet.text import is_unicode, shorten

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

_TableRow = tuple[str, str, tuple[str, ...], int]
_ROWS_PER_TABLE = 65_536
_BAD_ROW = ("", "", ("",))


@dataclass(frozen=True)
class FolderSource:
    """Rows of a metadata file in one Arrow table: small for millions of rows, and pickled without a copy.

    Paths are resolved where they are read: the folder must have the same name on all machines.
    """

    folder: Root
    """Absolute path of the metadata file's folder, in which its paths begin."""
    metadata_file: str
    """Path of the metadata file as the user knows it, for messages."""
    table: pa.Table
    """image, conditioning_image: large_string paths, relative to the folder or absolute, or images in base64;
    captions: large_list of large_string; line: int64, of the metadata file, from 1 (of parquet and JSON arrays: the
    row); 0 without a metadata file. In an object store also image_bytes, conditioning_image_bytes: int64."""
    content_hash: str
    """Hash of the metadata file and the columns read from it."""
    bad_rows: Mapping[int, str] = field(default_factory=dict)
    """Row -> reason, of the rows that cannot be used whatever their files hold."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def remote(self) -> bool:
        return isinstance(self.folder, RemotePath)

    def read(self, row: int) -> ImageRow:
        """Return row 0 <= `row` < len, in constant time; opens no file.

        Raises:
            DataError: if the row cannot be used.
        """
        if row in self.bad_rows:
            raise DataError(f"{self._place(row)}: {self.bad_rows[row]}")
        return ImageRow(
            image=self._image(row, "image"),
            conditioning_image=self._image(row, "conditioning_image"),
            captions=tuple(self.table["captions"][row].as_py()),
            place=self._place(row),
        )

    def problems(self) -> Iterator[str]:
        """Yield what keeps rows from being read on this machine: no rows, rows of another form, missing files."""
        if not len(self):
            yield f"{self.metadata_file}: has no rows"
        unusable = [f"{self._place(row)}: {reason}" for row, reason in self.bad_rows.items()]
        yield from shorten(unusable, "lines cannot be used")
        columns = {column: self._column(column) for column in ("image", "conditioning_image")}
        yield from missing_problems(self.folder, columns, self._place)

    def files(self, row: int) -> tuple[str, ...]:
        """Return the paths of the row's images, unless they are in the metadata file."""
        texts = (self.table[name][row].as_py() for name in ("image", "conditioning_image"))
        return tuple(str(Path(str(self.folder), text)) for text in texts if not is_embedded(text))

    def fingerprint(self) -> str:
        """Return a hash of the metadata file's content and the columns read. A folder may be moved."""
        return self.content_hash

    def identities(self, rows: Sequence[int]) -> Iterator[str]:
        """See `Source.identities`."""
        for row in rows:
            image, conditioning_image = (self._identity(row, name) for name in ("image", "conditioning_image"))
            yield json.dumps([*image, *conditioning_image, self.table["captions"][row].as_py()])

    def paths_outside(self) -> list[str]:
        """Return the paths that lead out of the folder: `../` and absolute ones."""
        import pyarrow.compute as pc

        found: list[str] = []
        for column in ("image", "conditioning_image"):
            paths = self.table[column]
            found += paths.filter(pc.match_substring_regex(paths, r"^/|(^|/)\.\.(/|$)")).to_pylist()
        inside = f"{str(self.folder).rstrip('/')}/"
        return [path for path in found if not is_embedded(path) and not _is_inside(path, inside)]

    def _place(self, row: int) -> str:
        line = self.table["line"][row].as_py()
        return f"{self.metadata_file}:{line}" if line else str(joined(self.folder, self.table["image"][row].as_py()))

    def _identity(self, row: int, column: str) -> tuple[str, int | None]:
        text = self.table[column][row].as_py()
        if not self.remote or is_embedded(text):
            return file_identity(self.folder, text)
        return text, self.table[f"{column}_bytes"][row].as_py()

    def _image(self, row: int, column: str) -> EncodedImage:
        text = self.table[column][row].as_py()
        return path_or_image(self.folder, text, f"{self._place(row)}: {column}")

    def _column(self, name: str) -> Iterator[str]:
        return (text for chunk in self.table[name].chunks for text in chunk.to_pylist())


def open_folder(folder: AnyPath, data: SourceConfig) -> FolderSource:
    """Read the rows of `folder`; opens no image.

    Raises:
        DataError: if it has no rows in a form that is read, or its columns do not exist. `FolderSource.problems` names
            rows (`file:line`) that are no JSON objects, lack a column or hold a wrong type, and missing files.
    """
    path = _metadata_file(folder)
    if path is None:
        raise DataError(f"{folder}: has none of {', '.join(METADATA_FILES)}")
    try:
        columns, table, bad_rows = _read_table(path, data)
        content_hash = _content_hash(path, columns)
    except OSError as error:
        raise unreadable(path, error) from None
    source = folder_source(path.parent, str(path), table, content_hash, bad_rows)
    # `raycontrolnet condition` names the pictures where they are, by our own doing.
    if (outside := source.paths_outside()) and not written_by_condition(path):
        logger.warning(
            "%s: %s of its images lie outside of its folder, as %s; they are read there",
            path,
            f"{len(outside):,}",
            shown_path(outside[0]),
        )
    return source


def folder_source(
    folder: AnyPath, metadata_file: str, table: pa.Table, content_hash: str, bad_rows: Mapping[int, str]
) -> FolderSource:
    """Return the rows of `table`; in an object store, folders are listed for the sizes of the files."""
    import pyarrow as pa

    root = folder if isinstance(folder, RemotePath) else str(folder.absolute())
    if isinstance(root, RemotePath):
        for column in ("image", "conditioning_image"):
            sizes = [_num_bytes(root, path) for chunk in table[column].chunks for path in chunk.to_pylist()]
            table = table.append_column(f"{column}_bytes", pa.array(sizes, pa.int64()))
    return FolderSource(root, metadata_file, table, content_hash, bad_rows)


def has_metadata(folder: AnyPath) -> bool:
    """Check whether `open_folder` finds a metadata file in `folder`."""
    return _metadata_file(folder) is not None


def _metadata_file(folder: AnyPath) -> AnyPath | None:
    # Image folders with several splits keep this one in `train`.
    places = (place for place in (folder, folder / "train") if place.is_dir())
    paths = (place / name for place in places for name in METADATA_FILES)
    return next((path for path in paths if path.is_file()), None)


def _read_table(path: AnyPath, data: SourceConfig) -> tuple[Columns | None, pa.Table, dict[int, str]]:
    """Read the rows as `FolderSource.table` and `bad_rows`; find the columns by the first row that can be parsed."""
    import pyarrow as pa

    columns = None
    tables, bad_rows = [rows_table([])], {}
    rows: list[_TableRow] = []
    for index, (number, row) in enumerate(metadata_rows(path)):
        try:
            if isinstance(row, ValueError):
                raise row
            columns = columns or find_columns(data, list(row), str(path))
            rows.append((*_read_row(row, columns), number))
        except ValueError as error:
            bad_rows[index] = str(error)
            rows.append((*_BAD_ROW, number))
        if len(rows) == _ROWS_PER_TABLE:
            tables.append(rows_table(rows))
            rows.clear()
    tables.append(rows_table(rows))
    table = pa.concat_tables(tables).combine_chunks()  # one chunk per column: finding a row takes no search
    return columns, table, bad_rows


def _num_bytes(root: RemotePath, path: str) -> int | None:
    if not path or is_embedded(path):
        return None
    place = joined(root, path)
    return place.num_bytes() if isinstance(place, RemotePath) else file_bytes("", path)


def _read_row(row: dict[str, Any], columns: Columns) -> tuple[str, str, tuple[str, ...]]:
    if columns.caption not in row:
        raise ValueError(f"has no {columns.caption}, only: {', '.join(row)}")
    try:
        captions = read_captions(row[columns.caption])
    except ValueError as error:
        raise ValueError(f"{columns.caption} {error}") from None
    image, conditioning_image = read_path(row, columns.image), read_path(row, columns.conditioning_image)
    if not is_unicode("".join((image, conditioning_image, *captions))):
        raise ValueError("holds a text that is not valid Unicode")
    return image, conditioning_image, captions


def _is_inside(path: str, folder: str) -> bool:
    return os.path.normpath(os.path.join(folder, path)).startswith(folder)  # noqa: PTH118 (a million paths)


def rows_table(rows: Sequence[_TableRow]) -> pa.Table:
    """Return `rows` as `FolderSource.table`."""
    import pyarrow as pa

    text = pa.large_string()  # 64-bit offsets: the paths of very large data sets exceed 2 GiB
    types = {"image": text, "conditioning_image": text, "captions": pa.large_list(text), "line": pa.int64()}
    columns = zip(*rows, strict=True) if rows else ([] for _ in types)
    arrays = [pa.array(values, kind) for values, kind in zip(columns, types.values(), strict=True)]
    return pa.table(arrays, schema=pa.schema(types))


def _content_hash(path: AnyPath, columns: Columns | None) -> str:
    digest = hashlib.sha256(repr(("folder", columns)).encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
