"""A shard on its way into the latent cache: load its rows, encode them (`encoder`), store them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raycontrolnet.data.records import EncodedRow, UInt8Image
from raycontrolnet.data.sources import Source
from raycontrolnet.data.transforms import encode_conditioning, prepare_images
from raycontrolnet.errors import DataError, RunError
from raycontrolnet.latents.cache import shard_bytes
from raycontrolnet.latents.manifest import BadSample, Shard, StoredShard
from raycontrolnet.storage.folder import CacheFolder


@dataclass(frozen=True)
class LoadedRow:
    """A row before its image is encoded."""

    row: int
    image: UInt8Image
    """[resolution, resolution, 3] RGB."""
    conditioning_png: bytes
    captions: tuple[str, ...]
    identity: str
    place: str
    """Place of the row in its source, for messages."""


@dataclass(frozen=True)
class LoadedShard:
    """A shard before its images are encoded."""

    shard: Shard
    rows: list[LoadedRow]
    bad_samples: list[BadSample]


@dataclass(frozen=True)
class EncodedShard:
    """A shard ready to be stored."""

    shard: Shard
    rows: list[EncodedRow]
    bad_samples: list[BadSample]


@dataclass(frozen=True)
class ShardResult:
    """A shard that is stored."""

    stored: StoredShard
    bad_samples: list[BadSample]


def load_shard(source: Source, shard: Shard, resolution: int) -> LoadedShard:
    """Decode and transform the images of a shard; rows that cannot be used become bad samples."""
    rows, bad_samples = [], []
    for row, identity in zip(shard.rows, source.identities(shard.rows), strict=True):
        try:
            loaded = source.read(row)
            image, conditioning_image = prepare_images(loaded, resolution)
        except DataError as error:
            bad_samples.append(BadSample(row, str(error)))
        else:
            png = encode_conditioning(conditioning_image)
            rows.append(LoadedRow(row, image, png, loaded.captions, identity, loaded.place))
    return LoadedShard(shard, rows, bad_samples)


def with_posteriors(loaded: LoadedShard, posteriors: Iterable[NDArray[np.float32]], dtype: str) -> EncodedShard:
    """Return the shard with each row's posterior as `dtype`; rows whose posterior is not finite are bad samples."""
    rows, bad_samples = [], list(loaded.bad_samples)
    for row, exact in zip(loaded.rows, posteriors, strict=True):
        with np.errstate(over="ignore"):
            posterior = exact.astype(dtype)
        if np.isfinite(posterior).all():
            rows.append(EncodedRow(row.row, posterior, row.conditioning_png, row.captions, row.identity))
        else:
            why = f"latents that {dtype} cannot hold; try --latents_dtype float32" if dtype == "float16" else "NaN"
            bad_samples.append(BadSample(row.row, f"{row.place}, image: the VAE makes {why}"))
    return EncodedShard(loaded.shard, rows, bad_samples)


def store_shard(folder: CacheFolder, encoded: EncodedShard) -> ShardResult:
    """Write the shard's file, whole or not at all.

    Raises:
        RunError: if it cannot be written, as on a full disk.
    """
    data = shard_bytes(encoded.rows, encoded.bad_samples)
    try:
        folder.write(encoded.shard.name, data)
    except OSError as error:
        raise RunError(f"{folder.name} cannot be written to: {error.strerror or error}") from error
    return ShardResult(StoredShard(encoded.shard.name, len(encoded.rows), data.size), encoded.bad_samples)
