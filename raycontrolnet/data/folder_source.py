"""A folder of images and a metadata file with a row for each: metadata.jsonl, the original prompt.json and others.

Not read by `datasets`: its errors name no line, and it takes `file_name` for the first image column of the file,
whichever that is (seen in 5.2).
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycontrolnet.config.settings import DataConfig
from raycontrolnet.data.columns import Columns, file_bytes, find_columns, kind_name, missing_files, read_captions
from raycontrolnet.data.records import ImageRow
from raycontrolnet.errors import DataError
from raycontrolnet.text import error_message, shorten

if TYPE_CHECKING:
    import pyarrow as pa

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "prompt.json", "train.jsonl")
"""Names in the order of the search: image folders; the original ControlNet layout; the fill50k repository."""

_ROWS_PER_TABLE = 65_536


@dataclass(frozen=True)
class FolderSource:
    """Rows of a metadata file in one Arrow table: small for millions of rows, and pickled without a copy.

    Paths are resolved where they are read: the folder must have the same name on all machines.
    """

    folder: str
    """Absolute path of the metadata file's folder, in which its paths begin."""
    metadata_file: str
    """Path of the metadata file as the user knows it, for messages."""
    table: pa.Table
    """image, conditioning_image: large_string paths, relative to the folder or absolute; captions: large_list of
    large_string; line: int64, of the metadata file, from 1 (of parquet: the row)."""
    content_hash: str
    """Hash of the metadata file and the columns read from it."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def read(self, row: int) -> ImageRow:
        """Return row 0 <= `row` < len, in constant time; opens no file."""
        table = self.table
        return ImageRow(
            image=str(Path(self.folder, table["image"][row].as_py())),
            conditioning_image=str(Path(self.folder, table["conditioning_image"][row].as_py())),
            captions=tuple(table["captions"][row].as_py()),
            place=f"{self.metadata_file}:{table['line'][row].as_py()}",
        )

    def problems(self) -> Iterator[str]:
        """Yield what keeps rows from being read on this machine: no rows, or missing files."""
        if not len(self):
            yield f"{self.metadata_file}: has no rows"
        missing = []
        for column in ("image", "conditioning_image"):
            paths = (path for chunk in self.table[column].chunks for path in chunk.to_pylist())
            for row, path in missing_files(self.folder, paths):
                line = self.table["line"][row]
                missing.append((row, f"{self.metadata_file}:{line}: {column} {path}: no such file"))
        yield from shorten([problem for _, problem in sorted(missing)], "files are missing")

    def fingerprint(self) -> str:
        """Return a hash of the metadata file's content and the columns read. A folder may be moved."""
        return self.content_hash

    def identities(self, rows: Sequence[int]) -> Iterator[str]:
        """See `Source.identities`."""
        for row in rows:
            image, conditioning_image = (self.table[name][row].as_py() for name in ("image", "conditioning_image"))
            yield json.dumps(
                [
                    image,
                    file_bytes(self.folder, image),
                    conditioning_image,
                    file_bytes(self.folder, conditioning_image),
                    self.table["captions"][row].as_py(),
                ]
            )


def has_metadata(folder: str) -> bool:
    """Check whether `open_folder` finds a metadata file in `folder`."""
    return _metadata_file(folder) is not None


def open_folder(folder: str, data: DataConfig) -> FolderSource:
    """Read the metadata file of `folder`; opens no image.

    Raises:
        DataError: with all problems of the file: columns that do not exist, and lines (`file:line`) that are no JSON
            objects, lack a column or hold a wrong type. `FolderSource.problems` names files that do not exist.
    """
    path = _metadata_file(folder)
    if path is None:
        raise DataError(f"{folder}: has none of {', '.join(METADATA_FILES)}")
    try:
        columns, table = _read_table(path, data)
        content_hash = _content_hash(path, columns)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error_message(error)})") from None
    return FolderSource(str(path.parent.absolute()), str(path), table, content_hash)


def _metadata_file(folder: str) -> Path | None:
    # Image folders with several splits keep this one in `train`.
    paths = (Path(folder, split, name) for split in (".", "train") for name in METADATA_FILES)
    return next((path for path in paths if path.is_file()), None)


def _read_table(path: Path, data: DataConfig) -> tuple[Columns | None, pa.Table]:
    """Read the rows as `FolderSource.table`, and find the columns by the first one; None in a file without rows."""
    import pyarrow as pa

    columns = None
    tables, problems = [_schema().empty_table()], []
    rows: list[tuple[str, str, tuple[str, ...], int]] = []

    def flush() -> None:
        try:
            values = zip(zip(*rows, strict=True), _schema().types, strict=True)
            tables.append(pa.table([pa.array(*value) for value in values], schema=_schema()))
        except UnicodeEncodeError:  # half of a surrogate pair, as in "\ud83d"
            problems.append(f"{path}: a text in lines {rows[0][-1]} to {rows[-1][-1]} is not valid Unicode")
        rows.clear()

    for number, row in metadata_rows(path):
        try:
            if isinstance(row, ValueError):
                raise row
            columns = columns or find_columns(data, list(row), str(path))
            rows.append((*_read_row(row, columns), number))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
            if columns is None:
                break
        if len(rows) == _ROWS_PER_TABLE:
            flush()
    if rows:
        flush()
    if problems:
        raise DataError("\n".join(shorten(problems, "lines cannot be used")))
    return columns, pa.concat_tables(tables).combine_chunks()  # one chunk per column: finding a row takes no search


def metadata_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Yield line number, from 1, and content of every row; a ValueError for one that cannot be parsed."""
    if path.suffix == ".csv":
        return _csv_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    return _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    """Parse line by line: a million take seconds, and an error belongs to its line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                try:
                    yield number, _parse(line)
                except ValueError as error:
                    yield number, error


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="more columns than the first line")
        try:
            for row in reader:
                yield reader.line_num, row
        except UnicodeDecodeError:  # of a block of lines: the next ones are lost
            yield reader.line_num + 1, ValueError("or a line soon after it is not UTF-8 text")
        except csv.Error as error:
            yield reader.line_num, ValueError(f"is not valid CSV ({error})")


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: is not valid parquet ({error_message(error)})") from None


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf").strip())
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not valid JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, is {kind_name(row)}; the file holds one object per line")
    return row


def _read_row(row: dict[str, Any], columns: Columns) -> tuple[str, str, tuple[str, ...]]:
    if columns.caption not in row:
        raise ValueError(f"has no {columns.caption}, only: {', '.join(row)}")
    try:
        captions = read_captions(row[columns.caption])
    except ValueError as error:
        raise ValueError(f"{columns.caption} {error}") from None
    return read_path(row, columns.image), read_path(row, columns.conditioning_image), captions


def read_path(row: dict[str, Any], column: str) -> str:
    """Return the path of an image in a row of a metadata file.

    Raises:
        ValueError: if there is none; says what there is instead.
    """
    path = row.get(column)
    if isinstance(path, str) and path:
        return path
    if column not in row:
        raise ValueError(f"has no {column}, only: {', '.join(row)}")
    raise ValueError(f"{column} must be the path of an image, is {'empty' if path == '' else kind_name(path)}")


def _schema() -> pa.Schema:
    import pyarrow as pa

    text = pa.large_string()  # 64-bit offsets: the paths of very large data sets exceed 2 GiB
    return pa.schema({"image": text, "conditioning_image": text, "captions": pa.large_list(text), "line": pa.int64()})


def _content_hash(path: Path, columns: Columns | None) -> str:
    digest = hashlib.sha256(repr(("folder", columns)).encode())
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]
