"""The latent cache on disk: shards of encoded rows, read row by row in any order.

A shard is an Arrow file with one record batch per row: reading a row reads its own bytes alone, memory stays flat
however large the cache is, and a full shuffle needs no buffer. Every row has a checksum, verified when read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raycontrolnet.cluster.shared_files import SharedFiles
from raycontrolnet.data.augmentation import CENTRED, View
from raycontrolnet.data.decoding import damaged_shard
from raycontrolnet.data.records import EncodedRow, Size
from raycontrolnet.latents.manifest import BadSample, Manifest, Shard, StoredShard
from raycontrolnet.storage.folder import CacheFolder
from raycontrolnet.text import error_message

ROW_OVERHEAD_BYTES = 1150
"""Bytes that Arrow adds to a row, about."""
LOOKED_AT_SHARDS = 32
"""Shards, about, that are looked for on the nodes of a cluster."""
OPEN_SHARDS = 64
"""Shards that a process keeps open; each index takes a few kilobytes."""

_SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "posterior": pa.large_binary(),
        "shape": pa.list_(pa.int64()),
        "dtype": pa.string(),
        "conditioning_png": pa.large_binary(),
        "captions": pa.list_(pa.string()),
        "identity": pa.string(),
        "original_size": pa.list_(pa.int64()),
        "flipped_posterior": pa.large_binary(),
        "crop": pa.list_(pa.float64()),
        "checksum": pa.int64(),
    }
)
"""Columns of a shard; those of earlier versions have no original_size."""
_IF_AUGMENTED = ("flipped_posterior", "crop")
"""Columns that a shard has only if its cache stores such."""
_BAD_SAMPLES = b"bad_samples"


@dataclass(frozen=True)
class LatentCache:
    """The rows of a complete cache. Pickles small; each process opens the shards that it reads."""

    folder: CacheFolder
    shard_names: tuple[str, ...]
    first_positions: NDArray[np.int64]
    """Position of each shard's first row among all rows of the cache."""
    rows: NDArray[np.int64]
    """The source's row at each position, ascending."""
    row_bytes: int
    """Bytes of a row, on average."""
    bad_rows: tuple[int, ...] = ()
    """Rows of the source that cannot be used."""

    @staticmethod
    def of(folder: CacheFolder, manifest: Manifest, shards: Sequence[Shard]) -> LatentCache:
        """Return the cache that `manifest` describes; `shards` are its shards as planned."""
        bad = tuple(sample.row for sample in manifest.bad_samples)
        rows = np.array([row for shard in shards for row in shard.rows], np.int64)
        ends = np.cumsum([shard.num_rows for shard in manifest.shards])
        return LatentCache(
            folder=folder,
            shard_names=tuple(shard.name for shard in manifest.shards),
            first_positions=np.concatenate([[0], ends[:-1]]).astype(np.int64),
            rows=rows[~np.isin(rows, bad)],
            row_bytes=manifest.num_bytes // max(1, manifest.num_rows),
            bad_rows=bad,
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def remote(self) -> bool:
        return not self.folder.is_local

    def files(self) -> SharedFiles:
        """Return some of its files, which every machine must see that reads from it."""
        names = self.shard_names[:: -(-len(self.shard_names) // LOOKED_AT_SHARDS) or 1] if self.folder.is_local else ()
        return SharedFiles.of(f"--latents_cache_dir={self.folder.name}", [self.folder.path(name) for name in names])

    def read(self, row: int, view: View = CENTRED) -> EncodedRow:
        """Return the source's row `row`, verified; it has the cache's own crop whatever the `view`.

        Raises:
            DataError: naming the shard, if it is damaged or gone.
        """
        position = int(np.searchsorted(self.rows, row))
        shard = int(np.searchsorted(self.first_positions, position, side="right")) - 1
        return read_row(self.folder, self.shard_names[shard], position - int(self.first_positions[shard]), row)


def shard_bytes(rows: Sequence[EncodedRow], bad_samples: Sequence[BadSample]) -> pa.Buffer:
    """Return the content of a shard's file."""
    bad = json.dumps([[sample.row, sample.reason] for sample in bad_samples])
    left_out = [name for name in _IF_AUGMENTED if all(getattr(row, name) is None for row in rows)]
    schema = pa.schema([field for field in _SCHEMA if field.name not in left_out], {_BAD_SAMPLES: bad})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as file:
        for row in rows:
            values = {
                "row": row.row,
                "posterior": row.posterior.tobytes(),
                "shape": list(row.posterior.shape),
                "dtype": row.posterior.dtype.name,
                "conditioning_png": row.conditioning_png,
                "captions": list(row.captions),
                "identity": row.identity,
                "original_size": row.original_size and list(row.original_size),
            }
            if row.flipped_posterior is not None:
                values["flipped_posterior"] = row.flipped_posterior.tobytes()
            if row.crop is not None:
                values["crop"] = list(row.crop)
            values["checksum"] = _checksum(values)
            file.write_batch(pa.record_batch([[values[name]] for name in schema.names], schema=schema))
    return sink.getvalue()


def _checksum(values: dict[str, object]) -> int:
    """Return the CRC-32 of everything else in a row."""
    total = 0
    for name in _SCHEMA.names:
        if name in values:
            value = values[name]
            total = zlib.crc32(value if isinstance(value, bytes) else json.dumps(value).encode(), total)
    return total


def read_row(folder: CacheFolder, shard: str, slot: int, row: int) -> EncodedRow:
    """Return the row at place `slot` of a shard, which must be the source's row `row`.

    Raises:
        DataError: if the shard is damaged or gone.
        ConnectionError: if it cannot be read now, as over a network that is down; it was tried for some seconds.
    """

    def read_anew() -> dict[str, Any]:
        _reader.cache_clear()
        return _verified(_reader(folder, shard), slot, row)

    with _naming(folder, shard):
        try:
            values = _verified(_reader(folder, shard), slot, row)
        except (pa.ArrowException, OSError, ValueError, IndexError):  # the file may have been replaced
            values = folder.reached(read_anew)
    posterior, flipped = (
        np.frombuffer(data, values["dtype"]).reshape(values["shape"]) if data is not None else None
        for data in (values["posterior"], values.get("flipped_posterior"))
    )
    assert posterior is not None
    return EncodedRow(
        row=row,
        posterior=posterior,
        conditioning_png=values["conditioning_png"],
        captions=tuple(values["captions"]),
        identity=values["identity"],
        original_size=_size(values.get("original_size")),
        place=folder.path(shard),
        flipped_posterior=flipped,
        crop=tuple(values["crop"]) if values.get("crop") else None,
    )


def _size(stored: list[int] | None) -> Size | None:
    return (stored[0], stored[1]) if stored else None


def _verified(reader: pa.RecordBatchFileReader, slot: int, row: int) -> dict[str, Any]:
    batch = reader.get_batch(slot)
    batch.validate(full=True)
    values = {name: batch.column(name)[0].as_py() for name in batch.schema.names}
    if values["row"] != row or values.pop("checksum") != _checksum(values):
        raise pa.ArrowInvalid(f"the checksum of row {row} is wrong")
    return values


def read_contents(folder: CacheFolder, shard: str, num_bytes: int) -> tuple[StoredShard, list[BadSample]]:
    """Return the contents of a shard, from its index alone.

    Raises:
        DataError: if the shard is damaged or gone.
    """
    with _naming(folder, shard):
        reader = folder.reached(lambda: pa.ipc.open_file(folder.open(shard)))
        bad = [BadSample(*values) for values in json.loads((reader.schema.metadata or {})[_BAD_SAMPLES])]
        return StoredShard(shard, reader.num_record_batches, num_bytes), bad


def read_identities(folder: CacheFolder, shards: Sequence[StoredShard]) -> Iterator[str]:
    """Yield the identity of every row in `shards`; ? for rows that are damaged or gone.

    Raises:
        UserError, RunError: if the folder cannot be reached.
    """

    def read(name: str) -> list[str]:
        reader = pa.ipc.open_file(folder.open(name))
        batches = map(reader.get_batch, range(reader.num_record_batches))
        return [batch.column("identity")[0].as_py() for batch in batches]

    for shard in shards:
        try:
            yield from folder.reached(lambda shard=shard: read(shard.name))  # type: ignore[misc]
        except (pa.ArrowException, OSError) as error:
            if folder.is_unreachable(error):
                raise folder.failure(error) from None
            yield from ["?"] * shard.num_rows


@contextmanager
def _naming(folder: CacheFolder, shard: str) -> Iterator[None]:
    """Turn an error from reading a shard into one that names it: damage, or storage that cannot be reached."""
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, ValueError, IndexError) as error:
        if folder.is_unreachable(error):
            reason = error_message(error, 200)
            raise ConnectionError(f"{folder.path(shard)}: the latent cache cannot be read now ({reason})") from None
        reason = "it is gone" if isinstance(error, FileNotFoundError) else error_message(error, 200)
        raise damaged_shard(folder.path(shard), reason) from None


@lru_cache(maxsize=OPEN_SHARDS)
def _reader(folder: CacheFolder, shard: str) -> pa.RecordBatchFileReader:
    return pa.ipc.open_file(folder.open(shard))
