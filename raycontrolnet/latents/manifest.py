"""The table of contents of a latent cache: its encoding, its shards and their names, its manifest.

A shard is a file with `SHARD_ROWS` rows of the source. Its name holds a hash of everything that decides its content:
the encoding and, for each row, file names, sizes and captions. So a shard is never made twice, whoever made it, and
when the data changes, only the shards with changed rows are new.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raycontrolnet.data.buckets import Buckets
from raycontrolnet.data.records import Size
from raycontrolnet.data.sources import Source
from raycontrolnet.data.transforms import TRANSFORMS_VERSION
from raycontrolnet.storage.folder import CacheFolder

MANIFEST_FILE = "manifest.json"
FORMAT = 1
SHARD_ROWS = 32


@dataclass(frozen=True)
class Encoding:
    """Everything that decides how an image becomes latents."""

    vae: str
    """Hash of the VAE's weights and configuration."""
    resolution: int
    dtype: str
    """float16 or float32, for the stored latents."""
    subset: tuple[int, int] | None = None
    """(seed, number of rows) if only a random subset of the data is encoded."""
    transforms: int = TRANSFORMS_VERSION
    format: int = FORMAT
    interpolation: str = "bilinear"
    """Resizing of the images."""
    buckets: tuple[Size, ...] | None = None
    """Sizes that images are brought to, each to the nearest in shape; None for the resolution squared."""

    def __repr__(self) -> str:
        """Return the text that names are hashed from: what was added later shows only where it is not as before."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.interpolation == "bilinear":
            del fields["interpolation"]
        if self.buckets is None:
            del fields["buckets"]
        return f"Encoding({', '.join(f'{name}={value!r}' for name, value in fields.items())})"

    def differences(self, other: Encoding) -> list[str]:
        """Return in words what `other` has instead."""
        names = {field.name: getattr(other, field.name) for field in dataclasses.fields(self)}
        in_words = {"vae": "encoded by another VAE", "buckets": "other aspect buckets"}
        return [in_words.get(name, f"{name}: {getattr(self, name)}, not {theirs}")
                for name, theirs in names.items() if getattr(self, name) != theirs]  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """A file of the cache, as planned."""

    name: str
    rows: tuple[int, ...]
    """Rows of the source."""
    sizes: tuple[Size, ...] | None = None
    """Size that the images of each row are brought to; None for the resolution squared."""


def plan_shards(
    source: Source, rows: Sequence[int], encoding: Encoding, buckets: Buckets | None = None
) -> Iterator[Shard]:
    """Yield the shards of `rows`. Looks at the size of every image file, and opens none.

    Args:
        buckets: of the rows, if the encoding has some.
    """
    prefix = repr(encoding).encode()
    for index, start in enumerate(range(0, len(rows), SHARD_ROWS)):
        own = tuple(int(row) for row in rows[start : start + SHARD_ROWS])
        digest = hashlib.blake2b(prefix, digest_size=8)
        for identity in source.identities(own):
            digest.update(identity.encode() + b"\n")
        sizes = tuple(map(buckets.size_of, own)) if buckets else None
        if sizes:
            digest.update(repr(sizes).encode())
        yield Shard(f"{index:06d}-{digest.hexdigest()}.arrow", own, sizes)


@dataclass(frozen=True)
class BadSample:
    """A row that cannot be used."""

    row: int
    reason: str
    """With the row's place and the image's path."""


@dataclass(frozen=True)
class StoredShard:
    """A file of the cache on disk."""

    name: str
    num_rows: int
    """Without the bad samples."""
    num_bytes: int


@dataclass(frozen=True)
class Manifest:
    """The table of contents of a complete cache, written last."""

    encoding: Encoding
    shards: tuple[StoredShard, ...]
    bad_samples: tuple[BadSample, ...]
    versions: Mapping[str, str]

    @property
    def num_rows(self) -> int:
        """Without the bad samples."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    def write(self, folder: CacheFolder) -> None:
        """Write the manifest to its folder."""
        folder.write(MANIFEST_FILE, json.dumps(dataclasses.asdict(self), indent=1).encode())

    @staticmethod
    def read(folder: CacheFolder) -> Manifest | None:
        """Return the manifest of a complete cache; None if there is none that this version can read.

        Raises:
            UserError, RunError: if the folder cannot be reached.
        """
        try:
            values: dict[str, Any] = json.loads(folder.read(MANIFEST_FILE))
            encoding = values["encoding"]
            subset, buckets = encoding.pop("subset"), encoding.pop("buckets", None)
            return Manifest(
                encoding=Encoding(
                    **encoding,
                    subset=None if subset is None else tuple(subset),
                    buckets=None if buckets is None else tuple((height, width) for height, width in buckets),
                ),
                shards=tuple(StoredShard(**shard) for shard in values["shards"]),
                bad_samples=tuple(BadSample(**bad) for bad in values["bad_samples"]),
                versions=values["versions"],
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        except OSError as error:
            raise folder.failure(error) from None
