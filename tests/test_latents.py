"""The latent cache on disk: what goes in comes out, in any order, and damage is found and named."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raycontrolnet.data.order import SampleOrder
from raycontrolnet.data.records import EncodedRow
from raycontrolnet.data.size_conditioning import SizeConditioning
from raycontrolnet.data.stream import BatchLoader
from raycontrolnet.data.transforms import decode_conditioning, encode_conditioning
from raycontrolnet.errors import DataError, UserError
from raycontrolnet.latents import cache as cache_module
from raycontrolnet.latents.cache import LatentCache, read_contents, read_row, shard_bytes
from raycontrolnet.latents.manifest import BadSample, Encoding, Manifest, Shard, StoredShard
from raycontrolnet.storage import folder as folder_module
from raycontrolnet.storage import uri
from raycontrolnet.storage.folder import CacheFolder, cache_folder

ENCODING = Encoding(vae="0" * 16, resolution=32, dtype="float16")


def encoded_row(row: int, *, dtype: str = "float16", shape: tuple[int, ...] = (2, 4, 4, 4)) -> EncodedRow:
    rng = np.random.default_rng(row)
    control = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return EncodedRow(
        row=row,
        posterior=rng.standard_normal(shape).astype(dtype),
        conditioning_png=encode_conditioning(control),
        captions=("a rød circle", f"number {row}"),
        identity=f'["{row}.png", {row}]',
        original_size=(600 + row, 800),
    )


def same(row: EncodedRow, other: EncodedRow) -> bool:
    return (
        row.posterior.dtype == other.posterior.dtype
        and np.array_equal(row.posterior, other.posterior)
        and (row.row, row.conditioning_png, row.captions, row.identity, row.original_size)
        == (other.row, other.conditioning_png, other.captions, other.identity, other.original_size)
    )


def test_shards_of_versions_that_did_not_keep_sizes(folder: CacheFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read as they were; only who asks for sizes is told."""
    names = [name for name in cache_module._SCHEMA.names if name != "original_size"]
    with monkeypatch.context() as earlier:
        earlier.setattr(cache_module, "_SCHEMA", pa.schema([cache_module._SCHEMA.field(name) for name in names]))
        cache = cache_of(folder, [0, 1])
    assert same(cache.read(1), dataclasses.replace(encoded_row(1), original_size=None))
    order = SampleOrder(2, seed=0)
    assert BatchLoader(cache, order, 1, 0.0, sizes=SizeConditioning(32)).sample(0).size_conditions is not None
    with pytest.raises(DataError, match="--size_conditioning=real: the latent cache was made by an earlier version"):
        BatchLoader(cache, order, 1, 0.0, sizes=SizeConditioning(32, real=True)).sample(0)


@pytest.fixture
def folder(tmp_path: Path) -> CacheFolder:
    return cache_folder(str(tmp_path / "cache"))


def cache_of(folder: CacheFolder, *shards: list[int], bad: tuple[BadSample, ...] = ()) -> LatentCache:
    """Write a cache of shards with these rows; bad samples are in none of them."""
    stored, planned = [], []
    for index, rows in enumerate(shards):
        data = shard_bytes([encoded_row(row) for row in rows], ())
        folder.write(f"{index}.arrow", data)
        stored.append(StoredShard(f"{index}.arrow", len(rows), data.size))
        planned.append(Shard(f"{index}.arrow", tuple(sorted([*rows, *(b.row for b in bad if index == 0)]))))
    return LatentCache.of(folder, Manifest(ENCODING, tuple(stored), bad, {}), planned)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_row_comes_out_as_it_went_in(folder: CacheFolder, dtype: str) -> None:
    rows = [encoded_row(row, dtype=dtype) for row in (7, 8, 9)]
    bad = [BadSample(6, "photo.png: no such file")]
    data = shard_bytes(rows, bad)
    folder.write("a.arrow", data)
    for slot in (2, 0, 1):
        assert same(read_row(folder, "a.arrow", slot, rows[slot].row), rows[slot])
    assert read_contents(folder, "a.arrow", data.size) == (StoredShard("a.arrow", 3, data.size), bad)


def test_rows_are_read_in_any_order_also_where_bad_samples_left_gaps(folder: CacheFolder) -> None:
    cache = cache_of(folder, [0, 2, 3], [4, 5], [6], bad=(BadSample(1, "broken"),))
    cache = pickle.loads(pickle.dumps(cache))
    assert len(cache) == 6
    for row in (6, 0, 5, 2, 4, 3):
        assert same(cache.read(row), encoded_row(row))


def test_conditioning_images_keep_every_pixel_and_grey_ones_are_stored_as_grey() -> None:
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    grey = np.repeat(rng.integers(0, 256, (16, 16, 1), dtype=np.uint8), 3, axis=-1)
    for image in (colour, grey, np.zeros_like(grey)):
        assert np.array_equal(decode_conditioning(encode_conditioning(image)), image)
    assert len(encode_conditioning(grey)) < len(encode_conditioning(colour)) / 2


def test_latents_of_512_pixels_take_at_most_70_kb() -> None:
    rows = [encoded_row(row, shape=(2, 4, 64, 64)) for row in range(4)]
    control_bytes = sum(len(row.conditioning_png) for row in rows)
    assert (shard_bytes(rows, ()).size - control_bytes) / len(rows) <= 70_000


def test_no_flipped_byte_gives_other_data(folder: CacheFolder) -> None:
    """Wherever the byte lies: the shard is refused by name, or the byte was padding and the data is what it was."""
    rows = [encoded_row(row) for row in (0, 1)]
    data = bytearray(shard_bytes(rows, ()))
    refused = 0
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 0x55
        name = f"{place}.arrow"
        folder.write(name, bytes(damaged))
        for slot, row in enumerate(rows):
            message = ""
            try:
                assert same(read_row(folder, name, slot, row.row), row)
            except DataError as error:
                message = str(error)
                refused += 1
            assert not message or (name in message and "raycontrolnet prepare" in message)
    content = sum(row.posterior.nbytes + len(row.conditioning_png) for row in rows)
    assert refused > content / 7  # every such byte, and some of Arrow's own


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone"])
def test_a_shard_that_is_not_whole_is_named(folder: CacheFolder, damage: str) -> None:
    cache = cache_of(folder, [0, 1])
    path = Path(folder.uri, "0.arrow")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 100 if damage == "truncated" else 0])
    with pytest.raises(DataError, match=r"0\.arrow: this part of the latent cache is damaged") as caught:
        cache.read(0)
    assert ("it is gone" in str(caught.value)) == (damage == "gone")


def failing_open(monkeypatch: pytest.MonkeyPatch, error: Exception, times: int) -> list[str]:
    """Let the first `times` files of caches fail to open; return the names of those that were tried."""
    real, tried = CacheFolder.open, []

    def open_file(self: CacheFolder, name: str) -> Any:
        tried.append(name)
        if len(tried) <= times:
            raise error
        return real(self, name)

    monkeypatch.setattr(CacheFolder, "open", open_file)
    for name in ("RUN_WAITS_S", "DISK_WAITS_S"):
        monkeypatch.setattr(folder_module, name, (0.01, 0.01))
    return tried


FAULTS = [
    OSError("When reading information for key '0.arrow' in bucket 'b': AWS Error NETWORK_CONNECTION during HeadObject"),
    OSError(errno.EIO, "Input/output error"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
]


@pytest.mark.parametrize("error", FAULTS, ids=str)
def test_storage_that_fails_is_not_called_damage(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    folder = cache_folder("mock:///bucket/faults")
    cache = cache_of(folder, [0, 1])
    expected = cache.read(1)
    cache_module._reader.cache_clear()
    tried = failing_open(monkeypatch, error, times=3)
    assert same(cache.read(1), expected)
    assert len(tried) == 4
    cache_module._reader.cache_clear()
    failing_open(monkeypatch, error, times=99)
    with pytest.raises(ConnectionError, match=r"0\.arrow: the latent cache cannot be read now \(") as caught:
        cache.read(0)
    assert "damaged" not in str(caught.value)
    assert "Delete" not in str(caught.value)


def test_a_bucket_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found before anything is encoded."""
    monkeypatch.setattr(uri, "STORES_WITH_BUCKETS", ("mock",))
    with pytest.raises(UserError, match=r"=mock:///gone/cache: cannot be used \(there is no bucket gone, or it is not"):
        cache_folder("mock:///gone/cache")


def test_a_row_of_another_place_is_refused(folder: CacheFolder) -> None:
    cache_of(folder, [0, 1])
    with pytest.raises(DataError, match="damaged"):
        read_row(folder, "0.arrow", 0, 1)


def test_a_file_is_there_whole_or_not_at_all(folder: CacheFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write("a", b"before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        folder.write("a", b"after")
    assert folder.read("a") == b"before"
    assert [path.name for path in Path(folder.uri).iterdir()] == ["a"]


def test_unfinished_files_of_another_process_are_not_seen(folder: CacheFolder) -> None:
    assert folder.sizes() == {}
    folder.write("a", b"12345")
    young, old = Path(folder.uri, ".b.0123.partial"), Path(folder.uri, ".c.4567.partial")
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert folder.sizes() == {"a": 5}
    folder.remove_leftovers()
    assert (young.exists(), old.exists()) == (True, False)


def test_an_object_store_is_a_folder_like_any_other() -> None:
    """Pyarrow's store in memory takes the way of S3 and GCS: streams, not files that are renamed."""
    folder = cache_folder("mock:///bucket/rows")
    assert not folder.is_local
    assert folder.sizes() == {}
    cache = cache_of(folder, [0, 1, 2], [3])
    assert folder.sizes().keys() == {"0.arrow", "1.arrow"}
    assert same(cache.read(3), encoded_row(3))
    assert folder.free_bytes() is None
    with pytest.raises(FileNotFoundError):
        folder.read("nothing")


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--latents_cache_dir=.*file: is a file"):
        cache_folder(str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"--latents_cache_dir=nowhere://x/y: cannot be used \(.*; name a folder, or"):
        cache_folder("nowhere://x/y")
