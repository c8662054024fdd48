"""Rows of a metadata file: JSON lines or a JSON array, CSV, parquet.

Not read by `datasets`: its errors name no line, and it takes `file_name` for the first image column of the file,
whichever that is (seen in 5.2).
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raycontrolnet.data.columns import kind_name
from raycontrolnet.data.remote_path import AnyPath
from raycontrolnet.errors import DataError
from raycontrolnet.storage.files import sha256_of
from raycontrolnet.text import NOT_UTF8, error_message, is_unicode

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "prompt.json", "train.jsonl")
"""Names in the order of the search: image folders; the original ControlNet layout; the fill50k repository."""
CONDITION_JOURNAL = ".condition.jsonl"
"""Journal that `raycontrolnet condition` leaves beside the metadata file that it wrote, whose hash it holds."""

Row = dict[str, Any] | ValueError
"""Content of a row, or what is wrong with it."""

LONGEST_FIELD = 2**30
"""Characters of a CSV value: images in base64 are long."""

_BOM = b"\xef\xbb\xbf"
_ONE_PER_LINE = "the file holds one object per line"


def metadata_rows(path: AnyPath) -> Iterator[tuple[int, Row]]:
    """Yield line number, from 1, and content of every row; a ValueError for one that cannot be parsed.

    In parquet and in a JSON array the number is the row's.

    Raises:
        DataError: if the whole file is of another form.
    """
    if path.suffix == ".csv":
        return _csv_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    return _json_rows(path)


def written_by_condition(path: AnyPath) -> bool:
    """Check that `raycontrolnet condition` wrote the metadata file at `path`, and nobody has changed it since."""
    try:
        journal = Path(str(path.parent), CONDITION_JOURNAL).read_text(encoding="utf-8", errors="replace")
        return sha256_of(Path(str(path.parent)), [path.name])[path.name] in journal
    except OSError:
        return False


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


def _json_rows(path: AnyPath) -> Iterator[tuple[int, Row]]:
    """Parse line by line: a million take seconds, and an error belongs to its line."""
    with path.open("rb") as file:
        first = next((line for line in file if not line.isspace()), b"").removeprefix(_BOM).strip()
        if first == b"[" or first.startswith((b"[{", b"[ ")):
            yield from _array_rows(path)
            return
        if first == b"{":
            raise DataError(f"{path}: its objects go over several lines; write each in one line, or an array of them")
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.isspace():
                try:
                    yield number, _object(parse_json(line))
                except ValueError as error:
                    yield number, error


def _array_rows(path: AnyPath) -> Iterator[tuple[int, Row]]:
    try:
        rows = parse_json(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path}: begins as a JSON array, but {error}") from None
    for number, row in enumerate(rows, 1):
        try:
            yield number, _object(row)
        except ValueError as error:
            yield number, error


def parse_json(text: bytes) -> Any:
    """Return the value that JSON `text` holds.

    Raises:
        ValueError: if it is none; says what is wrong, and where.
    """
    try:
        return json.loads(text.removeprefix(_BOM).strip())
    except UnicodeDecodeError:
        raise ValueError(NOT_UTF8) from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"is not valid JSON ({error.msg}, {place}){_advice(text, error)}") from None


def _advice(text: bytes, error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data" and error.doc[error.pos :].strip() == ",":
        return f"; {_ONE_PER_LINE}, without a comma after it"
    if (bracket := _after_a_comma(error)) is not None:
        return f"; no comma stands before {bracket}"
    if text.lstrip().startswith((b"{'", b"{ '")):
        return "; JSON's texts stand in double quotes"
    return ""


def _after_a_comma(error: json.JSONDecodeError) -> str | None:
    """Return the closing bracket before which a comma stands, if that is the error."""
    before, after = error.doc[: error.pos].rstrip(), error.doc[error.pos :].lstrip()
    if error.msg.startswith("Illegal trailing comma"):  # from Python 3.13 on; its place is the comma's
        return after[1:].lstrip()[:1]
    expected = {"}": "Expecting property name", "]": "Expecting value"}.get(after[:1], "\0")
    return after[0] if before.endswith(",") and error.msg.startswith(expected) else None


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object, is {kind_name(row)}; {_ONE_PER_LINE}")
    return row


def _csv_rows(path: AnyPath) -> Iterator[tuple[int, Row]]:
    """Read the rows strictly: a quote or comma too many must not shift or swallow texts."""
    header: list[str] | None = None
    csv.field_size_limit(LONGEST_FIELD)
    # Bytes that are no UTF-8 become half surrogates, which `_csv_row` finds: an error belongs to its line.
    with io.TextIOWrapper(path.open("rb"), "utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True, skipinitialspace=True)
        while True:
            number = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                lines = "" if reader.line_num == number else f", read up to line {reader.line_num}"
                yield number, ValueError(f"is not valid CSV ({error}{lines}); is a double quote too many?")
                yield from _swallowed(number, reader.line_num)
                continue
            if not values:
                continue
            if header is None:
                header = _csv_header(values, f"{path}:{number}")
                continue
            row = _csv_row(header, values, lines=reader.line_num - number + 1)
            yield number, row
            if isinstance(row, ValueError):
                yield from _swallowed(number, reader.line_num)


def _csv_header(values: Sequence[str], place: str) -> list[str]:
    names = [value.strip() for value in values]
    for separator, word in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(names) == 1 and separator in names[0]:
            raise DataError(
                f"{place}: its columns are separated by {word}; separate them by commas, and put texts with a comma "
                "in double quotes"
            )
    if doubled := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{place}: has several columns of the name {doubled[0]!r}")
    return names


def _swallowed(first: int, last: int) -> Iterator[tuple[int, ValueError]]:
    """Yield the other lines of a row that cannot be used: each may have been one, and counts among the bad ones."""
    for number in range(first + 1, last + 1):
        yield number, ValueError(f"was taken for a part of the row in line {first}")


def _csv_row(header: Sequence[str], values: Sequence[str], lines: int) -> Row:
    if len(values) != len(header):
        more = len(values) > len(header)
        hint = "; a text with a comma stands in double quotes" if more else ""
        return ValueError(f"has {len(values)} values for the {len(header)} columns of the first line{hint}")
    if not all(value.isascii() or is_unicode(value) for value in values):
        return ValueError(NOT_UTF8)
    if lines > 1 and (swallowed := _swallowed_row(header, values)):
        return ValueError(
            f'goes over {lines} lines, and "{swallowed[:60]}" in it looks like a row of its own: is there a double '
            "quote too many? A text of several lines that is right can be written in one"
        )
    return dict(zip(header, values, strict=True))


def _swallowed_row(header: Sequence[str], values: Sequence[str]) -> str | None:
    """Return the line of a quoted text that has as many values as a row, and files of the same kinds."""
    kinds = {Path(value).suffix for value in values if "\n" not in value} - {""}
    for line in (line for value in values for line in value.splitlines()[1:]):
        parts = line.split(",")
        if len(parts) >= len(header) and any(Path(part.strip()).suffix in kinds for part in parts):
            return line
    return None


def _parquet_rows(path: AnyPath) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: is not valid parquet ({error_message(error)})") from None
