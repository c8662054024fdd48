"""The latent cache as it should be, beside what is there."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.order import SampleOrder
from raycontrolnet.data.sources import Source
from raycontrolnet.data.transforms import prepare_images
from raycontrolnet.errors import ConfigError, DataError
from raycontrolnet.latents.cache import read_contents, read_identities
from raycontrolnet.latents.manifest import SHARD_ROWS, BadSample, Encoding, Manifest, Shard, plan_shards
from raycontrolnet.latents.shards import ShardResult
from raycontrolnet.latents.vae_files import VaeFiles
from raycontrolnet.storage.folder import CacheFolder, cache_folder


@dataclass(frozen=True)
class LatentPlan:
    """Which shards a run needs, and where."""

    config: TrainConfig
    source: Source
    folder: CacheFolder
    encoding: Encoding
    shards: tuple[Shard, ...]
    manifest: Manifest | None
    """Of the complete cache that is there, whether it fits or not."""
    posterior_bytes: int
    """Of one sample's latents."""

    @staticmethod
    def of(config: TrainConfig, source: Source, token: str | None) -> LatentPlan:
        """Looks at the folder, the VAE's files and the size of every image; reads no image.

        Raises:
            UserError: if folder or VAE cannot be used.
        """
        vae = VaeFiles.find(config, token)
        subset = None
        num_used = (config.max_train_samples or len(source)) + config.num_held_out(len(source))
        if num_used < len(source):
            if config.seed is None:
                problem = f"--max_train_samples={config.max_train_samples}: needs --seed, which decides the rows"
                raise ConfigError([problem])
            subset = (config.seed, num_used)
        encoding = Encoding(vae.fingerprint, config.resolution, config.latents_dtype, subset)
        folder = _folder(config, encoding)
        manifest = Manifest.read(folder)
        if manifest is not None and manifest.encoding == dataclasses.replace(encoding, subset=None):
            encoding = manifest.encoding  # a cache of all rows serves a subset as well
        order = SampleOrder(len(source), config.seed or 0, num_used if encoding.subset else None)
        rows: Sequence[int] = range(len(source)) if order.rows is None else sorted(order.rows.tolist())
        shards = tuple(plan_shards(source, rows, encoding))
        side = config.resolution // vae.factor
        posterior_bytes = 2 * vae.latent_channels * side * side * int(config.latents_dtype.removeprefix("float")) // 8
        return LatentPlan(config, source, folder, encoding, shards, manifest, posterior_bytes)

    @property
    def num_rows(self) -> int:
        return sum(len(shard.rows) for shard in self.shards)

    def check_encoding(self, command: Callable[..., str]) -> None:
        """Raise a ConfigError if the folder holds a cache of another kind; `command` makes the one that fits."""
        if self.manifest is None or self.manifest.encoding == self.encoding:
            return
        differences = "; ".join(self.manifest.encoding.differences(self.encoding))
        other = f"{self.folder.name}-{self.encoding.resolution}px"
        problem = (
            f"--latents_cache_dir={self.folder.uri}: the cache there does not fit this run ({differences}). Make one "
            f"that does in another folder:\n  {command(self.config, latents_cache_dir=other)}"
        )
        raise ConfigError([problem])

    def changes(self) -> str | None:
        """What changed in the data since the cache was made, in words."""
        if self.manifest is None:
            return None
        return data_changes(
            self.manifest,
            self.shards,
            stored=read_identities(self.folder, self.manifest.shards),
            now=(identity for shard in self.shards for identity in self.source.identities(shard.rows)),
        )

    def survey(self) -> tuple[dict[str, ShardResult], tuple[Shard, ...]]:
        """(what is there, by name; the shards that are missing).

        A file of another size than the manifest says is missing, and so is a shard with a bad sample that is one no
        longer.
        """
        sizes = self.folder.sizes()
        known = {} if self.manifest is None else {shard.name: shard for shard in self.manifest.shards}
        known_bad = {} if self.manifest is None else {sample.row: sample for sample in self.manifest.bad_samples}
        there, missing = {}, []
        for shard in self.shards:
            size, found = sizes.get(shard.name), None
            if shard.name in known:
                if size == known[shard.name].num_bytes:
                    bad_samples = [known_bad[row] for row in shard.rows if row in known_bad]
                    found = ShardResult(known[shard.name], bad_samples)
            elif size is not None:
                with suppress(DataError):  # damaged
                    found = ShardResult(*read_contents(self.folder, shard.name, size))
            if found is None or not all(self._is_bad(sample) for sample in found.bad_samples):
                missing.append(shard)
            else:
                there[shard.name] = found
        return there, tuple(missing)

    def _is_bad(self, sample: BadSample) -> bool:
        """Whether a bad sample still is one: it may have been mended, or a disk have been away."""
        try:
            prepare_images(self.source.read(sample.row), self.config.resolution)
        except DataError:
            return True
        return False

    def stale(self) -> dict[str, int]:
        """Name -> bytes of shards that are there and not needed: of earlier data."""
        needed = {shard.name for shard in self.shards}
        sizes = self.folder.sizes()
        return {name: size for name, size in sizes.items() if name.endswith(".arrow") and name not in needed}


def _folder(config: TrainConfig, encoding: Encoding) -> CacheFolder:
    """Where the cache is or will be; without a setting, a complete one of all rows is preferred to one of a subset."""
    if config.latents_cache_dir is not None:
        return cache_folder(config.latents_cache_dir)
    whole = CacheFolder(str(_default_folder(config, dataclasses.replace(encoding, subset=None))))
    if encoding.subset is None or Manifest.read(whole) is None:
        return cache_folder(str(_default_folder(config, encoding)))
    return whole


def _default_folder(config: TrainConfig, encoding: Encoding) -> Path:
    """One for each data set, model and size, named after the data."""
    data = config.train_data_dir or config.dataset_name or ""
    key = hashlib.blake2b(repr((data, config.dataset_config_name, encoding)).encode(), digest_size=4).hexdigest()
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / "raycontrolnet" / "latents" / f"{Path(data).name}-{encoding.resolution}px-{key}"


def data_changes(manifest: Manifest, shards: Sequence[Shard], stored: Iterator[str], now: Iterator[str]) -> str | None:
    """What changed in the data since `manifest` was written, in words; None if nothing has.

    Args:
        shards: those of the data as it is.
        stored: the identity of every row in the cache, in the order of the shards (read only if something changed).
        now: the same for the data as it is.
    """
    names = [shard.name for shard in shards]
    before = [shard.name for shard in manifest.shards]
    if names == before:
        return None
    differing = sum(name != other for name, other in itertools.zip_longest(names, before))
    changes = [f"{differing:,} of {len(names):,} parts of {SHARD_ROWS} rows are others"]
    num_rows, num_before = sum(len(shard.rows) for shard in shards), manifest.num_rows + len(manifest.bad_samples)
    if num_rows != num_before:
        changes.insert(0, f"{num_rows:,} rows, {num_before:,} in the cache")
    bad = {sample.row for sample in manifest.bad_samples}
    rows = [row for shard in shards for row in shard.rows]
    good = ((row, identity) for row, identity in zip(rows, now, strict=True) if row not in bad)
    first = next(((row, was, is_) for (row, is_), was in zip(good, stored, strict=False) if was != is_), None)
    if first is not None:
        changes.append(f"row {first[0]} is {first[2]} now, was {first[1]}")
    return "; ".join(changes)
