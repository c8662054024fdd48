"""What a latent cache holds and for what: how its shards are named, its manifest, and what keeps it from fitting a run.

A shard is a file with `SHARD_ROWS` rows of the source. Its name carries a key of all that decides its content: how
images are encoded and, for each of its rows, file names, sizes and captions. So a shard that is there need not be made
again, whoever made it; when the data changes, only the shards that it touches are new.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raycontrolnet.data.sources import Source
from raycontrolnet.data.transforms import TRANSFORMS_VERSION
from raycontrolnet.storage.folder import CacheFolder, unreachable

MANIFEST = "manifest.json"
FORMAT = 1
SHARD_ROWS = 32


@dataclass(frozen=True)
class Encoding:
    """What decides how an image becomes latents."""

    vae: str
    """Hash of the VAE's weights and configuration."""
    resolution: int
    dtype: str
    """float16 or float32: how latents are stored."""
    subset: tuple[int, int] | None = None
    """(seed, number of rows) if only a random subset of the data is encoded."""
    transforms: int = TRANSFORMS_VERSION
    format: int = FORMAT

    def differences(self, other: Encoding) -> list[str]:
        """What `other` has instead, in words."""
        names = {field.name: getattr(other, field.name) for field in dataclasses.fields(self)}
        return [f"{name}: {getattr(self, name)}, not {theirs}" for name, theirs in names.items()
                if getattr(self, name) != theirs]  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """A file of the cache that should be there."""

    name: str
    rows: tuple[int, ...]
    """Of the source."""


def plan_shards(source: Source, rows: Sequence[int], encoding: Encoding) -> Iterator[Shard]:
    """The shards of `rows`. Looks at the size of every image file; opens none."""
    prefix = repr(encoding).encode()
    for index, start in enumerate(range(0, len(rows), SHARD_ROWS)):
        own = tuple(int(row) for row in rows[start : start + SHARD_ROWS])
        digest = hashlib.blake2b(prefix, digest_size=8)
        for identity in source.identities(own):
            digest.update(identity.encode() + b"\n")
        yield Shard(f"{index:06d}-{digest.hexdigest()}.arrow", own)


@dataclass(frozen=True)
class BadSample:
    """A row that cannot be used."""

    row: int
    reason: str
    """With the row's place and the image's path."""


@dataclass(frozen=True)
class StoredShard:
    """A file of the cache that is there."""

    name: str
    num_rows: int
    """Without the bad samples."""
    num_bytes: int


@dataclass(frozen=True)
class Manifest:
    """The table of contents of a complete cache; written last."""

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
        folder.write(MANIFEST, json.dumps(dataclasses.asdict(self), indent=1).encode())

    @staticmethod
    def read(folder: CacheFolder) -> Manifest | None:
        """The manifest of a complete cache; None if there is none that this version can read.

        Raises:
            UserError: if the folder cannot be reached.
        """
        try:
            values: dict[str, Any] = json.loads(folder.read(MANIFEST))
            encoding = values["encoding"]
            subset = encoding.pop("subset")
            return Manifest(
                encoding=Encoding(**encoding, subset=None if subset is None else tuple(subset)),
                shards=tuple(StoredShard(**shard) for shard in values["shards"]),
                bad_samples=tuple(BadSample(**bad) for bad in values["bad_samples"]),
                versions=values["versions"],
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        except OSError as error:
            raise unreachable(folder.uri, error) from None
