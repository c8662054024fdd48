"""The table of contents of a latent cache: its encoding, its shards and their names, its manifest.

A shard is a file with `SHARD_ROWS` rows of the source. Its name holds a hash of everything that decides its content:
the encoding and, for each row, file names, sizes and captions. So a shard is never made twice, whoever made it, and
when the data changes, only the shards with changed rows are new.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from raycontrolnet.data.augmentation import Augmentation
from raycontrolnet.data.buckets import Buckets
from raycontrolnet.data.joined_source import named_sources
from raycontrolnet.data.order import SampleOrder
from raycontrolnet.data.records import Size
from raycontrolnet.data.source import Source
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
    random_flip: bool = False
    """True if the latents of the mirrored images are stored as well; such a cache serves runs without mirroring too."""
    crop: str = "center"
    """Place of the crop; a random one is fixed for each row."""
    held_out: tuple[int, int] | None = None
    """(seed, number) of the rows that are stored with the plain crop, if the others have random ones."""

    def __repr__(self) -> str:
        """Return the text that names are hashed from: what was added later shows only where it is not as before."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("interpolation", "buckets", "random_flip", "crop", "held_out"):
            if fields[name] == getattr(Encoding, name):
                del fields[name]
        return f"Encoding({', '.join(f'{name}={value!r}' for name, value in fields.items())})"

    @property
    def augmentation(self) -> Augmentation:
        """The crops, and mirroring, of the stored images."""
        return Augmentation(self.crop, self.random_flip)

    def serves(self, other: Encoding) -> bool:
        """Check whether a cache in this encoding holds what a run in the encoding `other` reads."""
        wanted = {
            # A cache of all rows serves a subset as well; buckets are of a run's own rows.
            "subset": other.subset if self.buckets else self.subset and other.subset,
            "random_flip": self.random_flip or other.random_flip,
        }
        return self == dataclasses.replace(other, **wanted)  # type: ignore[arg-type]

    def seed_for(self, other: Encoding) -> int | None:
        """Return the seed with which a cache in this encoding would serve `other`; None if there is none."""
        for drawn in (self.subset, self.held_out):
            if drawn is not None:
                seed = drawn[0]
                changed = dataclasses.replace(
                    other,
                    subset=other.subset and (seed, other.subset[1]),
                    held_out=other.held_out and (seed, other.held_out[1]),
                )
                if self.serves(changed):
                    return seed
        return None

    def differences(self, other: Encoding) -> list[str]:
        """Return in words what `other` has instead."""
        names = {field.name: getattr(other, field.name) for field in dataclasses.fields(self)}
        in_words = {
            "vae": "encoded by another VAE",
            "buckets": "other aspect buckets",
            "subset": f"of {_drawn(self.subset, 'all rows')}, not of {_drawn(other.subset, 'all rows')}",
            "held_out": f"{_drawn(self.held_out, 'none')} held out, not {_drawn(other.held_out, 'none')}",
        }
        return [in_words.get(name, f"{name}: {getattr(self, name)}, not {theirs}")
                for name, theirs in names.items() if getattr(self, name) != theirs]  # fmt: skip


def _drawn(rows: tuple[int, int] | None, none: str) -> str:
    """Return (seed, number) of rows in words."""
    return none if rows is None else f"{rows[1]:,} rows drawn by --seed {rows[0]}"


@dataclass(frozen=True)
class Shard:
    """A file of the cache, as planned."""

    name: str
    rows: tuple[int, ...]
    """Rows of the source."""
    sizes: tuple[Size, ...] | None = None
    """Size that the images of each row are brought to; None for the resolution squared."""
    plain: frozenset[int] = frozenset()
    """Rows that are not cropped at random, if others are."""


def plan_shards(
    source: Source, rows: Sequence[int], encoding: Encoding, buckets: Buckets | None = None
) -> Iterator[Shard]:
    """Yield the shards of `rows`. Looks at the size of every image file, and opens none.

    Args:
        buckets: of the rows, if the encoding has some.
    """
    prefix = repr(encoding).encode()
    plain: set[int] = set()
    if encoding.held_out is not None:
        seed, number = encoding.held_out
        plain.update(SampleOrder(len(source), seed, num_held_out=number).held_out.tolist())
    for index, own in enumerate(_rows_of_shards(source, rows)):
        digest = hashlib.blake2b(prefix, digest_size=8)
        for row, identity in zip(own, source.identities(own), strict=True):
            digest.update(identity.encode() + (b" plain\n" if row in plain else b"\n"))
        sizes = tuple(map(buckets.size_of, own)) if buckets else None
        if sizes:
            digest.update(repr(sizes).encode())
        yield Shard(f"{index:06d}-{digest.hexdigest()}.arrow", own, sizes, frozenset(plain.intersection(own)))


def _rows_of_shards(source: Source, rows: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the rows of each shard. Of several sources, each begins a shard: so another one after it changes nothing.

    Args:
        rows: ascending.
    """
    begin = 0
    for end_row in accumulate(map(len, named_sources(source))):
        end = bisect_left(rows, end_row)
        for start in range(begin, end, SHARD_ROWS):
            yield tuple(int(row) for row in rows[start : min(start + SHARD_ROWS, end)])
        begin = end


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
            encoding |= {name: tuple(encoding[name]) for name in ("subset", "held_out") if encoding.get(name)}
            if encoding.get("buckets"):
                encoding["buckets"] = tuple((height, width) for height, width in encoding["buckets"])
            return Manifest(
                encoding=Encoding(**encoding),
                shards=tuple(StoredShard(**shard) for shard in values["shards"]),
                bad_samples=tuple(BadSample(**bad) for bad in values["bad_samples"]),
                versions=values["versions"],
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        except OSError as error:
            raise folder.failure(error) from None
