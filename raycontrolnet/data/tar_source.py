"""Rows in tar shards, as WebDataset writes them: every file of a sample is found by a seek."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycontrolnet.config.settings import DataConfig
from raycontrolnet.data.byte_ranges import close_files, read_range
from raycontrolnet.data.columns import find_column, kind_name, read_captions
from raycontrolnet.data.metadata_file import parse_json
from raycontrolnet.data.paths import shown_path
from raycontrolnet.data.records import ImageRow
from raycontrolnet.data.sample_files import SampleFiles, is_json
from raycontrolnet.data.tar_index import Member, ShardIndex, extensions_of, read_index
from raycontrolnet.errors import DataError
from raycontrolnet.text import counted, error_message, printable, shorten

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

INDEX_THREADS = 8
"""Tars whose headers are read at a time: on a network disk, that is waiting."""
_FINGERPRINT_ROWS = 16
_FILES = ("image", "conditioning_image", "caption")
_BAD_ROW = (Member("", 0, 0),) * 3

_TableRow = tuple[str, Member, Member, Member]


@dataclass(frozen=True)
class TarShard:
    """A tar, as it was when its headers were read."""

    path: str
    """Absolute path: workers have another working directory."""
    shown: str
    """Path as the user knows it, for messages."""
    num_bytes: int
    modified_ns: int


@dataclass(frozen=True)
class TarSource:
    """Places of the samples' files in one Arrow table: small for millions of rows, and pickled without a copy.

    The tars must have the same names on all machines.
    """

    shown: str
    """Path of the tars as the user knows it, for messages."""
    shards: tuple[TarShard, ...]
    table: pa.Table
    """shard: int32; key: large_string, empty for what cannot be read of a tar; FILE_offset and FILE_size: int64, for
    image, conditioning_image and caption; caption_extension: large_string."""
    caption_column: str
    """As the user gave it: of captions in JSON."""
    bad_rows: Mapping[int, str] = field(default_factory=dict)
    """Row -> reason, of the rows that cannot be used whatever their files hold."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def read(self, row: int) -> ImageRow:
        """Return row 0 <= `row` < len; reads the bytes of its files alone.

        Raises:
            DataError: if the row cannot be used.
        """
        place = self._place(row)
        if row in self.bad_rows:
            raise DataError(f"{place}: {self.bad_rows[row]}")
        try:
            return ImageRow(
                image=self._bytes(row, "image"),
                conditioning_image=self._bytes(row, "conditioning_image"),
                captions=self._captions(row),
                place=place,
            )
        except (OSError, EOFError) as error:
            raise DataError(f"{place}: cannot be read ({error_message(error)})") from None
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None

    def problems(self) -> Iterator[str]:
        """Yield what keeps rows from being read on this machine: missing tars, tars and samples that are not whole."""
        if not len(self):
            yield f"{self.shown}: has no samples"
        unusable = [f"{self._place(row)}: {reason}" for row, reason in self.bad_rows.items()]
        yield from shorten(unusable, "samples and tars cannot be used")
        changed = [f"{shard.shown}: {reason}" for shard in self.shards if (reason := _change(shard))]
        yield from shorten(changed, "tars are missing or others")

    def files(self, row: int) -> tuple[str, ...]:
        """Return the path of the row's tar."""
        return (self._shard(row).path,)

    def fingerprint(self) -> str:
        """Return a hash of the samples' keys and files' sizes, and of a few rows. Tars may be moved and repacked."""
        names = ("key", *(f"{name}_size" for name in _FILES))
        digest = hashlib.sha256(b"tars")
        for batch in self.table.select(names).to_batches(max_chunksize=65_536):
            digest.update(repr([column.to_pylist() for column in batch.columns]).encode())
        for row in range(0, len(self), max(1, len(self) // _FINGERPRINT_ROWS)):
            with suppress(DataError):  # a bad sample, which may be skipped
                values = self.read(row)
                digest.update(repr((values.image, values.conditioning_image, values.captions)).encode())
        return digest.hexdigest()[:16]

    def identities(self, rows: Sequence[int]) -> Iterator[str]:
        """See `Source.identities`. Captions are read, images are not."""
        for row in rows:
            captions = None
            with suppress(OSError, EOFError, ValueError):
                captions = self._captions(row) if row not in self.bad_rows else None
            sizes = [self.table[f"{name}_size"][row].as_py() for name in ("image", "conditioning_image")]
            yield json.dumps([self.table["key"][row].as_py(), *sizes, captions])

    def _place(self, row: int) -> str:
        key = self.table["key"][row].as_py()
        return self._shard(row).shown + (f":{shown_path(printable(key))}" if key else "")

    def _shard(self, row: int) -> TarShard:
        return self.shards[self.table["shard"][row].as_py()]

    def _bytes(self, row: int, name: str) -> bytes:
        shard = self._shard(row)
        offset, size = (self.table[f"{name}_{part}"][row].as_py() for part in ("offset", "size"))
        return read_range(shard.path, offset, size, shard.modified_ns)

    def check_json(self) -> None:
        """Check that the first caption in JSON has the column that the user asks for.

        Raises:
            DataError: if it does not.
        """
        import pyarrow.compute as pc

        row = pc.index(pc.ends_with(self.table["caption_extension"], "json"), True).as_py()
        values = None
        with suppress(OSError, EOFError, ValueError):
            values = self._json(row) if row >= 0 else None
        if values is not None:
            try:
                find_column("caption_column", self.caption_column, list(values), f"the JSON of {self._place(row)}")
            except ValueError as error:
                raise DataError(str(error)) from None

    def _captions(self, row: int) -> tuple[str, ...]:
        """Return the captions of a row that is not bad.

        Raises:
            ValueError: if there are none in a form that is read; says what there is.
            OSError, EOFError: if the tar cannot be read.
        """
        extension = self._extension(row)
        if not is_json(extension):
            try:
                return (self._bytes(row, "caption").decode("utf-8-sig").strip(),)
            except UnicodeDecodeError:
                raise ValueError(f"its {extension} is not UTF-8 text") from None
        values = self._json(row)
        column = find_column("caption_column", self.caption_column, list(values), f"its {extension}")
        try:
            captions = read_captions(values[column])
        except ValueError as error:
            raise ValueError(f"its {extension}: {column} {error}") from None
        try:
            "".join(captions).encode()
        except UnicodeEncodeError:  # half of a surrogate pair, as in "\ud83d"
            raise ValueError(f"its {extension} holds a text that is not valid Unicode") from None
        return captions

    def _json(self, row: int) -> dict[str, Any]:
        try:
            values = parse_json(self._bytes(row, "caption"))
        except ValueError as error:
            raise ValueError(f"its {self._extension(row)} {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"its {self._extension(row)} must be a JSON object, is {kind_name(values)}")
        return values

    def _extension(self, row: int) -> str:
        return str(self.table["caption_extension"][row])


def open_tars(shown: str, paths: Sequence[Path], data: DataConfig) -> TarSource:
    """Read the headers of the tars `paths`, whose samples are the rows: by tar, then as they first come in it.

    `TarSource.problems` names samples that lack a file, and tars that cannot be read to their end.

    Raises:
        DataError: if no file has an extension that `data` asks for.
    """
    close_files()  # of an earlier run, which may have been removed since
    shards = tuple(_shard(path) for path in paths)
    logger.info("%s: reading the headers of %s", shown, counted(len(shards), "tar"))
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        indices = dict(zip(paths, pool.map(read_index, paths), strict=True))
    files = SampleFiles.of(data)
    _check_extensions(files, indices, shown)
    table, bad_rows = _rows(files, list(indices.values()))
    source = TarSource(shown, shards, table, files.json_caption, bad_rows)
    source.check_json()
    _say_keys_in_several(source)
    return source


def _shard(path: Path) -> TarShard:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error_message(error)})") from None
    return TarShard(str(path.absolute()), str(path), found.st_size, found.st_mtime_ns)


def _change(shard: TarShard) -> str | None:
    try:
        num_bytes = Path(shard.path).stat().st_size
    except OSError as error:
        return f"cannot be read ({error_message(error)})"
    if num_bytes != shard.num_bytes:
        return f"has {num_bytes:,} bytes on this machine and {shard.num_bytes:,} where the run was started"
    return None


def _check_extensions(files: SampleFiles, indices: Mapping[Path, ShardIndex], shown: str) -> None:
    """Raise a DataError if there are files, but none of an extension that is looked for."""
    for path, index in indices.items():
        if not (index.samples or index.fault):
            logger.warning("%s: holds no samples", path)
    extensions = list(extensions_of(indices))
    if not (extensions and (problems := files.problems(extensions, shown))):
        return
    if archive := next((path for path, index in indices.items() if index.metadata_file), None):
        name = indices[archive].metadata_file
        problems = [f"{archive}: holds {name}, so it is an archive of a data folder: unpack it there"]
    faults = [f"{path}: {index.fault}" for path, index in indices.items() if index.fault]
    raise DataError("\n".join([*problems, *shorten(faults, "tars cannot be read")]))


def _rows(files: SampleFiles, indices: Sequence[ShardIndex]) -> tuple[pa.Table, dict[int, str]]:
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
    for place, name in enumerate(_FILES, 1):
        for part in ("offset", "size"):
            columns[f"{name}_{part}"] = pa.array([getattr(row[place], part) for row in rows], pa.int64())
    columns["caption_extension"] = pa.array([row[3].extension for row in rows], pa.large_string())
    return pa.table(columns)


def _say_keys_in_several(source: TarSource) -> None:
    import pyarrow.compute as pc

    keys = source.table["key"].filter(pc.not_equal(source.table["key"], ""))
    if several := len(keys) - pc.count_distinct(keys).as_py():
        first = next(count["values"] for count in pc.value_counts(keys) if count["counts"].as_py() > 1)
        logger.warning(
            "%s: %s samples have the key of one in another tar, as %s; each is a row of its own",
            source.shown,
            f"{several:,}",
            first,
        )
