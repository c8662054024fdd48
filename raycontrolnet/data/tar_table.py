"""The samples in tar shards as rows of an Arrow table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raycontrolnet.data.sample_files import SampleFiles
from raycontrolnet.data.tar_index import Member, ShardIndex

if TYPE_CHECKING:
    import pyarrow as pa

FILES = ("image", "conditioning_image", "caption")
_BAD_ROW = (Member("", 0, 0),) * 3

_TableRow = tuple[str, Member, Member, Member]


def tar_rows(files: SampleFiles, indices: Sequence[ShardIndex]) -> tuple[pa.Table, dict[int, str]]:
    """Return `TarSource.table` and `bad_rows`; what cannot be read of a tar is its last row. Empties `indices`."""
    import pyarrow as pa

    tables, bad_rows, count = [_rows_table(0, [])], {}, 0
    for number, index in enumerate(indices):
        rows: list[_TableRow] = []
        for key, members in index.samples.items():
            if files.is_sample(members):
                try:
                    rows.append((key, *files.find(members)))
                except ValueError as error:
                    bad_rows[count + len(rows)] = str(error)
                    rows.append((key, *_BAD_ROW))
        if index.fault:
            bad_rows[count + len(rows)] = index.fault
            rows.append(("", *_BAD_ROW))
        index.samples.clear()
        tables.append(_rows_table(number, rows))
        count += len(rows)
    return pa.concat_tables(tables).combine_chunks(), bad_rows  # one chunk per column: finding a row takes no search


def _rows_table(shard: int, rows: Sequence[_TableRow]) -> pa.Table:
    import pyarrow as pa

    columns = {"shard": pa.array([shard] * len(rows), pa.int32())}
    columns["key"] = pa.array([row[0] for row in rows], pa.large_string())
    for place, name in enumerate(FILES, 1):
        for part in ("offset", "size"):
            columns[f"{name}_{part}"] = pa.array([getattr(row[place], part) for row in rows], pa.int64())
    columns["caption_extension"] = pa.array([row[3].extension for row in rows], pa.large_string())
    return pa.table(columns)
