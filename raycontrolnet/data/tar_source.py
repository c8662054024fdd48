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

from raycontrolnet.config.data_sources import SourceConfig
from raycontrolnet.data.byte_ranges import Version, close_files, read_ranges
from raycontrolnet.data.columns import MissingColumn, MissingColumns, find_column, kind_name, read_captions
from raycontrolnet.data.metadata_file import parse_json
from raycontrolnet.data.paths import shown_path
from raycontrolnet.data.records import ImageRow
from raycontrolnet.data.remote_path import AnyPath, RemotePath, unreadable
from raycontrolnet.data.sample_files import SampleFiles, is_json
from raycontrolnet.data.tar_index import ShardIndex, extensions_of, read_index
from raycontrolnet.data.tar_table import FILES, tar_rows
from raycontrolnet.errors import DataError
from raycontrolnet.storage.store_requests import REQUESTS
from raycontrolnet.text import NOT_UTF8, counted, error_message, is_unicode, printable, shorten

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

INDEX_THREADS = 8
"""Tars whose headers are read at a time: on a network disk, that is waiting."""
_FINGERPRINT_ROWS = 16


@dataclass(frozen=True)
class TarShard:
    """A tar, as it was when its headers were read."""

    path: str | RemotePath
    """Absolute path: workers have another working directory."""
    shown: str
    """Path as the user knows it, for messages."""
    version: Version


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

    @property
    def remote(self) -> bool:
        return any(isinstance(shard.path, RemotePath) for shard in self.shards[:1])

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
            image, conditioning_image, caption = self._bytes(row, *FILES)
            return ImageRow(image, conditioning_image, self._captions(row, caption), place)
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
        return (str(self._shard(row).path),)

    def fingerprint(self) -> str:
        """Return a hash of the samples' keys and files' sizes, and of a few rows. Tars may be moved and repacked."""
        names = ("key", *(f"{name}_size" for name in FILES))
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
        with ThreadPoolExecutor(REQUESTS if self.remote else 1) as pool:
            all_captions = pool.map(self._captions_if_any, rows)
        for row, captions in zip(rows, all_captions, strict=True):
            sizes = [self.table[f"{name}_size"][row].as_py() for name in ("image", "conditioning_image")]
            yield json.dumps([self.table["key"][row].as_py(), *sizes, captions])

    def _place(self, row: int) -> str:
        key = self.table["key"][row].as_py()
        return self._shard(row).shown + (f":{shown_path(printable(key))}" if key else "")

    def _shard(self, row: int) -> TarShard:
        return self.shards[self.table["shard"][row].as_py()]

    def _bytes(self, row: int, *names: str) -> list[bytes]:
        shard = self._shard(row)
        ranges = [
            (self.table[f"{name}_offset"][row].as_py(), self.table[f"{name}_size"][row].as_py()) for name in names
        ]
        return read_ranges(shard.path, ranges, shard.version)

    def check_json(self) -> None:
        """Check that the first caption in JSON has the column that the user asks for.

        Raises:
            DataError: if it does not.
        """
        import pyarrow.compute as pc

        row = pc.index(pc.ends_with(self.table["caption_extension"], "json"), True).as_py()
        values = None
        with suppress(OSError, EOFError, ValueError):
            values = self._json(row, *self._bytes(row, "caption")) if row >= 0 else None
        if values is not None:
            try:
                find_column("caption_column", self.caption_column, list(values), f"the JSON of {self._place(row)}")
            except MissingColumn as column:
                raise MissingColumns([column], values) from None

    def _captions_if_any(self, row: int) -> tuple[str, ...] | None:
        """Return the captions of a row; None if it is bad.

        Raises:
            DataError: if the store cannot be reached.
        """
        try:
            return self._captions(row, *self._bytes(row, "caption")) if row not in self.bad_rows else None
        except (OSError, EOFError) as error:
            if self.remote:
                raise DataError(f"{self._place(row)}: cannot be read ({error_message(error)})") from None
        except ValueError:
            pass
        return None

    def _captions(self, row: int, content: bytes) -> tuple[str, ...]:
        """Return the captions in the file of a row that is not bad.

        Raises:
            ValueError: if there are none in a form that is read; says what there is.
        """
        extension = self._extension(row)
        if not is_json(extension):
            try:
                return (content.decode("utf-8-sig").strip(),)
            except UnicodeDecodeError:
                raise ValueError(f"its {extension} {NOT_UTF8}") from None
        values = self._json(row, content)
        column = find_column("caption_column", self.caption_column, list(values), f"its {extension}")
        try:
            captions = read_captions(values[column])
        except ValueError as error:
            raise ValueError(f"its {extension}: {column} {error}") from None
        if not is_unicode("".join(captions)):
            raise ValueError(f"its {extension} holds a text that is not valid Unicode")
        return captions

    def _json(self, row: int, content: bytes) -> dict[str, Any]:
        try:
            values = parse_json(content)
        except ValueError as error:
            raise ValueError(f"its {self._extension(row)} {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"its {self._extension(row)} must be a JSON object, is {kind_name(values)}")
        return values

    def _extension(self, row: int) -> str:
        return str(self.table["caption_extension"][row])


def open_tars(shown: str, paths: Sequence[AnyPath], data: SourceConfig) -> TarSource:
    """Read the headers of the tars `paths`, whose samples are the rows: by tar, then as they first come in it.

    `TarSource.problems` names samples that lack a file, and tars that cannot be read to their end.

    Raises:
        DataError: if no file has an extension that `data` asks for.
    """
    close_files()  # of an earlier run, which may have been removed since
    shards = tuple(_shard(path) for path in paths)
    logger.info("%s: reading the headers of %s", shown, counted(len(shards), "tar"))
    with ThreadPoolExecutor(REQUESTS if isinstance(paths[0], RemotePath) else INDEX_THREADS) as pool:
        indices = dict(zip(paths, pool.map(read_index, paths), strict=True))
    files = SampleFiles.of(data)
    _check_extensions(files, indices, shown)
    table, bad_rows = tar_rows(files, list(indices.values()))
    source = TarSource(shown, shards, table, files.json_caption, bad_rows)
    source.check_json()
    _say_keys_in_several(source)
    return source


def _shard(path: AnyPath) -> TarShard:
    try:
        found = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    place = path if isinstance(path, RemotePath) else str(path.absolute())
    return TarShard(place, str(path), (found.st_size, found.st_mtime_ns))


def _change(shard: TarShard) -> str | None:
    try:
        path = Path(shard.path) if isinstance(shard.path, str) else shard.path
        num_bytes = path.stat().st_size
    except OSError as error:
        return f"cannot be read ({error_message(error)})"
    if num_bytes != shard.version[0]:
        return f"has {num_bytes:,} bytes on this machine and {shard.version[0]:,} where the run was started"
    return None


def _check_extensions(files: SampleFiles, indices: Mapping[AnyPath, ShardIndex], shown: str) -> None:
    """Raise a DataError if there are files, but none of an extension that is looked for."""
    for path, index in indices.items():
        if not (index.samples or index.fault):
            logger.warning("%s: holds no samples", path)
    extensions = list(extensions_of(indices))
    if not (extensions and (missing := files.missing(extensions, shown))):
        return
    faulty = [f"{path}: {index.fault}" for path, index in indices.items() if index.fault]
    faults = shorten(faulty, "tars cannot be read")
    if archive := next((path for path, index in indices.items() if index.metadata_file), None):
        name = indices[archive].metadata_file
        raise DataError(
            "\n".join([f"{archive}: holds {name}, so it is an archive of a data folder: unpack it there", *faults])
        )
    raise MissingColumns(missing, files.unused(extensions), faults)


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
