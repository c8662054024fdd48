"""A shard on its way into the latent cache.

    Shard -> load -> LoadedShard of LoadedRow -> encode -> EncodedShard of EncodedRow -> store -> ShardResult

A row that cannot be used becomes a BadSample, at any step. A shard that another process has stored meanwhile is a
ShardResult from the first step on, and passes through the others.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raycontrolnet.cluster.shared_files import SharedFiles
from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.data.augmentation import RANDOM, View
from raycontrolnet.data.records import EncodedRow, Size, UInt8Image
from raycontrolnet.data.source import Source
from raycontrolnet.data.stream import REMOTE_READS
from raycontrolnet.data.transforms import encode_conditioning, mirrored, prepare_images
from raycontrolnet.errors import DataError
from raycontrolnet.latents.cache import read_contents, shard_bytes
from raycontrolnet.latents.manifest import BadSample, Encoding, Shard, StoredShard
from raycontrolnet.storage.folder import CacheFolder, writing_to

if TYPE_CHECKING:
    from raycontrolnet.latents.encoder import LatentEncoder

Posterior = NDArray[np.float32]
"""Latents of an image as the encoder makes them; they are stored in the cache's type."""


@dataclass(frozen=True)
class LoadedRow:
    """A row before its image is encoded."""

    row: int
    image: UInt8Image
    """[height, width, 3] RGB."""
    conditioning_png: bytes
    captions: tuple[str, ...]
    identity: str
    place: str
    """Place of the row in its source, for messages."""
    original_size: Size
    """As in `EncodedRow`."""
    view: View
    """View that the images are of."""


@dataclass(frozen=True)
class LoadedShard:
    """A shard before its images are encoded."""

    name: str
    rows: list[LoadedRow]
    bad_samples: list[BadSample]


@dataclass(frozen=True)
class ShardResult:
    """A shard that is stored."""

    stored: StoredShard
    bad_samples: list[BadSample]


@dataclass(frozen=True)
class EncodedShard:
    """A shard ready to be stored."""

    result: ShardResult
    content: pa.Buffer


def load_shard(source: Source, shard: Shard, encoding: Encoding) -> LoadedShard:
    """Decode and transform the images of a shard; rows that cannot be used become bad samples."""

    def load(row: int, identity: str, size: Size | int) -> LoadedRow | BadSample:
        try:
            loaded = source.read(row)
            view = augmentation.plain if row in shard.plain else augmentation.fixed_view(identity)
            images = prepare_images(loaded, size, encoding.interpolation, view)
        except DataError as error:
            return BadSample(row, str(error))
        png = encode_conditioning(images.conditioning_image)
        return LoadedRow(row, images.image, png, loaded.captions, identity, loaded.place, images.original_size, view)

    augmentation, identities = encoding.augmentation, source.identities(shard.rows)
    sizes = shard.sizes or (encoding.resolution,) * len(shard.rows)
    if source.remote:
        with ThreadPoolExecutor(REMOTE_READS) as pool:
            rows = list(pool.map(load, shard.rows, identities, sizes))
    else:
        rows = list(map(load, shard.rows, identities, sizes))
    return LoadedShard(
        shard.name,
        [row for row in rows if isinstance(row, LoadedRow)],
        [row for row in rows if isinstance(row, BadSample)],
    )


@dataclass(frozen=True)
class EncodeJob:
    """The way in which shards are encoded. Plain data for tasks and actors; every one unpickles it."""

    source: Source
    files: SharedFiles
    """Files of the source that a machine must see to load a shard."""
    folder: CacheFolder
    encoding: Encoding
    replaced: frozenset[str]
    """Names of shards that are there and are made anew."""
    model: ModelConfig
    batch_size: int
    token: str | None = field(default=None, repr=False)

    def encoder(self, *, use_gpu: bool) -> LatentEncoder:
        """Load the VAE."""
        import torch

        from raycontrolnet.latents.encoder import LatentEncoder

        device = torch.device("cuda" if use_gpu else "cpu")
        return LatentEncoder(self.model, device=device, batch_size=self.batch_size, token=self.token)

    def load(self, shard: Shard) -> LoadedShard | ShardResult:
        """Load the shard's rows, or what is stored if another process was faster.

        Raises:
            UserError: if this machine does not see the data: its rows are not bad.
        """
        self.files.check_here()
        if shard.name not in self.replaced and (size := self.folder.size(shard.name)) is not None:
            with suppress(DataError):
                return ShardResult(*read_contents(self.folder, shard.name, size))
        return load_shard(self.source, shard, self.encoding)

    def encode(self, loaded: LoadedShard | ShardResult, encoder: LatentEncoder) -> EncodedShard | ShardResult:
        """Encode the shard's images; rows whose posterior is not finite are bad samples."""
        if isinstance(loaded, ShardResult):
            return loaded
        from raycontrolnet.model.performance import memory_advised

        both = self.encoding.random_flip
        with memory_advised(lambda: "Use a smaller --latents_batch_size"):
            posteriors = encoder.encode([row.image for row in loaded.rows])
            flipped = encoder.encode([mirrored(row.image) for row in loaded.rows]) if both else [None] * len(posteriors)
        rows, bad_samples = [], list(loaded.bad_samples)
        for row, posterior, posterior_flipped in zip(loaded.rows, posteriors, flipped, strict=True):
            found = self._encoded(row, posterior, posterior_flipped)
            if isinstance(found, EncodedRow):
                rows.append(found)
            else:
                bad_samples.append(found)
        content = shard_bytes(rows, bad_samples)
        return EncodedShard(ShardResult(StoredShard(loaded.name, len(rows), content.size), bad_samples), content)

    def _encoded(self, row: LoadedRow, posterior: Posterior, flipped: Posterior | None) -> EncodedRow | BadSample:
        """Return the row with its posterior, and with that of its mirror image if there is one."""
        dtype, found = self.encoding.dtype, [each for each in (posterior, flipped) if each is not None]
        with np.errstate(over="ignore"):
            stored = [each.astype(dtype) for each in found]
        if all(np.isfinite(each).all() for each in stored):
            return EncodedRow(
                row=row.row,
                posterior=stored[0],
                conditioning_png=row.conditioning_png,
                captions=row.captions,
                identity=row.identity,
                original_size=row.original_size,
                flipped_posterior=None if flipped is None else stored[1],
                crop=(row.view.top, row.view.left) if self.encoding.crop == RANDOM else None,
            )
        if all(np.isfinite(each).all() for each in found):
            why = f"latents that {dtype} cannot hold; use --latents_dtype float32"
        else:
            why = "latents that are not finite, even in fp32; are its weights damaged?"
        return BadSample(row.row, f"{row.place}, image: the VAE makes {why}")

    def store(self, encoded: EncodedShard | ShardResult) -> ShardResult:
        """Write the shard's file, whole or not at all.

        Raises:
            RunError: if it cannot be written, as on a full disk.
        """
        if isinstance(encoded, ShardResult):
            return encoded
        with writing_to(self.folder.name):
            self.folder.write(encoded.result.stored.name, encoded.content)
        return encoded.result
