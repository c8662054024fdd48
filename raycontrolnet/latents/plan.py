"""The latent cache that a run needs, compared with what is there."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycontrolnet.config.data_sources import sources_of
from raycontrolnet.config.settings import DataConfig
from raycontrolnet.config.train_config import TrainConfig, changed_settings, names_that_decide, names_with
from raycontrolnet.config.values import as_flag
from raycontrolnet.data.augmentation import RANDOM
from raycontrolnet.data.buckets import Buckets
from raycontrolnet.data.order import SampleOrder
from raycontrolnet.data.source import Source
from raycontrolnet.data.transforms import prepare_images
from raycontrolnet.errors import ConfigError, DataError
from raycontrolnet.latents.cache import read_contents, read_identities
from raycontrolnet.latents.manifest import SHARD_ROWS, BadSample, Encoding, Manifest, Shard, plan_shards
from raycontrolnet.latents.shards import ShardResult
from raycontrolnet.latents.vae_files import VaeFiles
from raycontrolnet.model.families.family import Family
from raycontrolnet.storage.files import user_cache
from raycontrolnet.storage.folder import CacheFolder, cache_folder
from raycontrolnet.storage.uri import is_uri, shown_uri

_LONGEST_NAME = 100
_NEEDS_SEED = "needs --seed to cache latents: it decides the held-out rows"


@dataclass(frozen=True)
class LatentPlan:
    """The shards that a run needs, and their folder."""

    config: TrainConfig
    source: Source
    folder: CacheFolder
    encoding: Encoding
    shards: tuple[Shard, ...]
    manifest: Manifest | None
    """Manifest of the complete cache that is there, whether it fits or not."""
    posterior_bytes: int
    """Size of one sample's latents; the largest, with buckets."""
    token: str | None = dataclasses.field(repr=False)
    buckets: Buckets | None = None
    """Size of each row; None for the resolution squared."""

    @staticmethod
    def of(
        config: TrainConfig, source: Source, family: Family, token: str | None, buckets: Buckets | None = None
    ) -> LatentPlan:
        """Plan the cache of a run, from the folder, the VAE's files and the size of every image; reads no image.

        Args:
            family: of the base model; it resizes images if the settings do not say how.
            buckets: of the run, for the rows that it uses.

        Raises:
            UserError: if folder or VAE cannot be used, or a seed is missing.
        """
        vae = VaeFiles.find(config, token)
        subset = None
        num_held_out = config.num_held_out(len(source))
        num_used = config.num_used(len(source))
        if num_used < len(source):
            if config.seed is None:
                problem = f"--max_train_samples={config.max_train_samples}: needs --seed, which decides the rows"
                raise ConfigError([problem])
            subset = (config.seed, num_used)
        if needed := lacks_seed(config, num_held_out):
            raise ConfigError([": ".join(needed)])
        encoding = Encoding(
            vae.fingerprint,
            config.resolution,
            config.latents_dtype,
            subset,
            interpolation=config.image_interpolation_mode or family.interpolation,
            buckets=buckets.sizes if buckets else None,
            random_flip=config.random_flip,
            crop=config.crop,
            held_out=_plain_rows(config, num_held_out),
        )
        folder = _folder(config.latents_cache_dir, config, encoding)
        manifest = Manifest.read(folder)
        if manifest is not None and manifest.encoding.serves(encoding):
            encoding = manifest.encoding
        order = SampleOrder(len(source), config.seed or 0, num_used if encoding.subset else None)
        rows: Sequence[int] = range(len(source)) if order.rows is None else sorted(order.rows.tolist())
        shards = tuple(plan_shards(source, rows, encoding, buckets))
        pixels = buckets.most_pixels if buckets else config.resolution**2
        latents = vae.latent_channels * pixels // vae.factor**2
        row_bytes = posterior_bytes(latents, config.latents_dtype, both=encoding.random_flip)
        return LatentPlan(config, source, folder, encoding, shards, manifest, row_bytes, token, buckets)

    @property
    def num_rows(self) -> int:
        return sum(len(shard.rows) for shard in self.shards)

    def check_encoding(self) -> None:
        """Check that the folder holds no cache of another encoding.

        Raises:
            ConfigError: if it does, with the command that makes one that fits.
        """
        if self.manifest is None or self.manifest.encoding == self.encoding:
            return
        differences = "; ".join(self.manifest.encoding.differences(self.encoding))
        other = f"{self.folder.name}-{self.encoding.resolution}px"
        seed = self.manifest.encoding.seed_for(self.encoding)
        instead = f"Use it with --seed {seed}, or make" if seed is not None else "Make"
        fits_not = f"the cache there does not fit this run ({differences})"
        problem = (
            f"--latents_cache_dir={self.folder.uri}: {fits_not}. {instead} one "
            f"that does in another folder:\n  {prepare_command(self.config, latents_cache_dir=other)}"
        )
        raise ConfigError([problem])

    def changes(self) -> str | None:
        """Return what changed in the data since the cache was made, in words; None if nothing has."""
        if self.manifest is None:
            return None
        return data_changes(
            self.manifest,
            self.shards,
            stored=read_identities(self.folder, self.manifest.shards),
            now=(identity for shard in self.shards for identity in self.source.identities(shard.rows)),
        )

    def survey(self) -> tuple[dict[str, ShardResult], tuple[Shard, ...]]:
        """Return the shards that are there, by name, and those that are missing.

        A shard counts as missing if its size is not the manifest's, or if one of its bad samples can be read now.
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
                try:
                    with suppress(DataError):  # damaged
                        found = ShardResult(*read_contents(self.folder, shard.name, size))
                except ConnectionError as error:
                    raise self.folder.failure(error) from None
            if found is None or not all(self._is_bad(sample) for sample in found.bad_samples):
                missing.append(shard)
            else:
                there[shard.name] = found
        return there, tuple(missing)

    def _is_bad(self, sample: BadSample) -> bool:
        """Check whether a bad sample is still unreadable."""
        try:
            size = self.buckets.size_of(sample.row) if self.buckets else self.encoding.resolution
            prepare_images(self.source.read(sample.row), size, self.encoding.interpolation)
        except DataError:
            return True
        return False

    def stale(self) -> dict[str, int]:
        """Return name -> bytes of the shards of earlier data, which are no longer needed."""
        needed = {shard.name for shard in self.shards}
        sizes = self.folder.sizes()
        return {name: size for name, size in sizes.items() if name.endswith(".arrow") and name not in needed}


def posterior_bytes(latents: int, latents_dtype: str, *, both: bool) -> int:
    """Return the bytes that a sample takes in the cache: mean and log-variance of so many latents.

    Args:
        both: whether the latents of its mirror image are stored as well.
    """
    return (4 if both else 2) * latents * int(latents_dtype.removeprefix("float")) // 8


def lacks_seed(config: TrainConfig, num_held_out: int) -> tuple[str, str] | None:
    """Return a flag by which the cache depends on the held-out rows, and why it needs --seed; None if that is given."""
    if config.seed is not None or not num_held_out:
        return None
    if config.crop == RANDOM:
        return f"--crop={RANDOM}", f"{_NEEDS_SEED}, which are not cropped at random"
    return ("--aspect_buckets", f"{_NEEDS_SEED}, and what is left of each bucket") if config.aspect_buckets else None


def _plain_rows(config: TrainConfig, num_held_out: int) -> tuple[int, int] | None:
    """Return (seed, number) of the held-out rows if the others are cropped at random."""
    if config.crop != RANDOM or not num_held_out:
        return None
    assert config.seed is not None  # see `lacks_seed`
    return config.seed, num_held_out


def _folder(asked: str | None, data: DataConfig, encoding: Encoding) -> CacheFolder:
    """Return the cache's folder; without a setting, a complete cache of all rows is preferred to one of a subset."""
    if asked is not None:
        return cache_folder(asked)
    whole = CacheFolder(str(_default_folder(data, dataclasses.replace(encoding, subset=None))))
    if encoding.subset is None or encoding.buckets or Manifest.read(whole) is None:
        return cache_folder(str(_default_folder(data, encoding)))
    return whole


def _default_folder(data: DataConfig, encoding: Encoding) -> Path:
    """Return a folder of its own for each data set, model and size, named after the data."""
    names = [source.name for source in sources_of(data)]
    named = (names[0] if len(names) == 1 else tuple(names), data.dataset_config_name, encoding)
    key = hashlib.blake2b(repr(named).encode(), digest_size=4).hexdigest()
    own = "+".join(Path(shown_uri(name) if is_uri(name) else name).name for name in names)[:_LONGEST_NAME]
    return user_cache() / "raycontrolnet" / "latents" / f"{own}-{encoding.resolution}px-{key}"


def prepare_command(config: TrainConfig, command: str = "prepare", **others: Any) -> str:
    """Return the command that makes the cache for `config`, with some settings changed to `others`.

    Args:
        command: of those that take the same flags.
    """
    names = {*names_that_decide("latents"), *names_with("in_prepare")}
    settings = {name: value for name, value in changed_settings(config).items() if name in names} | others
    if config.aspect_buckets:  # of which those with fewer rows than a batch are left out
        settings["train_batch_size"] = config.train_batch_size
    # The rows are drawn together with the held-out ones, which are not cropped at random.
    drawn = "max_train_samples" in settings or config.crop == RANDOM or config.aspect_buckets
    if drawn and config.seed is not None:
        settings["seed"] = config.seed
    if drawn and config.validation_split is not None:
        settings["validation_split"] = config.validation_split
    return " ".join([f"raycontrolnet {command}", *(as_flag(name, value) for name, value in settings.items())])


def data_changes(manifest: Manifest, shards: Sequence[Shard], stored: Iterator[str], now: Iterator[str]) -> str | None:
    """Return what changed in the data since `manifest` was written, in words; None if nothing has.

    Args:
        shards: those of the data as it is.
        stored: the identity of every row in the cache, in the shards' order; read only if something changed.
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
