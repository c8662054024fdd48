"""Whether a run trains from cached latents, and from which: decided before Ray starts, made once it has."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from raycontrolnet.cluster.resources import WorkerResources
from raycontrolnet.cluster.session import on_a_cluster
from raycontrolnet.config.checks import check_device, versions
from raycontrolnet.config.settings import ClusterConfig
from raycontrolnet.config.train_config import TrainConfig, changed_settings, names_that_decide, names_with
from raycontrolnet.data.sources import Source
from raycontrolnet.errors import ConfigError, DataError, RunError, UserError, explained
from raycontrolnet.latents.cache import ROW_OVERHEAD_BYTES, LatentCache
from raycontrolnet.latents.encode import EncodeJob, encode_here, encode_on_ray
from raycontrolnet.latents.manifest import Manifest, Shard
from raycontrolnet.latents.plan import LatentPlan
from raycontrolnet.latents.shards import ShardResult, load_shard
from raycontrolnet.launch.preflight import CheckedRun
from raycontrolnet.text import Counter, file_size, shorten

logger = logging.getLogger(__name__)


SAMPLED_SHARD_ROWS = 4
"""Rows whose conditioning images are compressed to estimate the cache's size."""
SHOWN_STALE = 5
SEVERAL_MACHINES = "the cluster has several machines: name a folder that all of them see, or an object store's URI"
BAD_SAMPLES_FILE = "bad_samples.txt"
Encode = Callable[[EncodeJob], Iterator[ShardResult]]


@dataclass(frozen=True)
class WantedLatents:
    """That a run is to use a cache."""

    plan: LatentPlan | None
    """Which; None if a cluster may have to be seen first, because no folder is named that all its machines share."""


def planned_latents(run: CheckedRun, stream: TextIO, *, reused: bool = False) -> WantedLatents | None:
    """The latent cache that the run is to use; None if it trains from pixels.

    Args:
        reused: whether other runs will use it as well.

    Raises:
        ConfigError: if there is a cache that does not fit.
    """
    config = run.config
    plan = run.plan(max(1, config.worker_range[1]), None)
    again = reused or plan.total_updates * plan.samples_per_update > plan.num_samples
    wanted = again or config.on_bad_sample == "skip"  # who is to skip must look at all before
    if config.cache_latents == "off" or (config.cache_latents == "auto" and not wanted):
        return None
    if run.random_subset:
        if config.cache_latents == "on":
            raise ConfigError([f"--max_train_samples={config.max_train_samples}: needs --seed, to cache these rows"])
        stream.write("latents: not cached, because --max_train_samples draws other rows without --seed\n")
        return None
    if config.latents_cache_dir is None and config.worker_range != (0, 0) and on_a_cluster(config.address):
        return WantedLatents(None)
    return WantedLatents(_plan(config, run.source, run.token))


def with_latents(
    run: CheckedRun, wanted: WantedLatents | None, encode: Encode, stream: TextIO, *, shared: bool = False
) -> CheckedRun:
    """The run as it will be: from cached latents, which are made now if need be, or from pixels.

    Args:
        shared: whether the cache must lie on storage that several machines see.

    Raises:
        ConfigError: if it does not, and must; else as `prepare`.
    """
    config = run.config
    if wanted is None:
        return run
    if shared and config.latents_cache_dir is None:
        if config.cache_latents == "on" or config.on_bad_sample == "skip":
            raise ConfigError([f"--latents_cache_dir: {SEVERAL_MACHINES}"])
        stream.write(f"latents: not cached; to train faster, give --latents_cache_dir ({SEVERAL_MACHINES})\n")
        return run
    plan = wanted.plan or _plan(config, run.source, run.token)
    cache, manifest = _cache(plan, encode, run.token, stream)
    run = dataclasses.replace(run, cache=cache, bad_rows=tuple(sample.row for sample in manifest.bad_samples))
    if run.start is not None and run.start.manifest.get("left_out", []) != list(run.bad_rows):
        logger.warning("%s was made with other bad samples left out: the order of samples changes", run.start.path)
    return run


def _plan(config: TrainConfig, source: Source, token: str | None) -> LatentPlan:
    """What the cache of a run will be; looks at what is there, and needs no Ray.

    Raises:
        ConfigError: if the folder holds a cache that does not fit; else as `LatentPlan.of`.
    """
    plan = LatentPlan.of(config, source, token)
    plan.check_encoding(prepare_command)
    if changes := plan.changes():
        problem = f"the data changed since its latents were cached in {plan.folder.uri}: {changes}"
        raise ConfigError([f"{problem}. Encode what is new with:\n  {prepare_command(plan.config)}"])
    return plan


def _cache(plan: LatentPlan, encode: Encode, token: str | None, stream: TextIO) -> tuple[LatentCache, Manifest]:
    """The cache for a run, made or completed if need be.

    Raises:
        UserError, RunError: as `prepare`.
    """
    there, missing = plan.survey()
    manifest = complete(plan, there, missing, encode, token, stream)
    return LatentCache.of(plan.folder, manifest, plan.shards), manifest


def here(cluster: ClusterConfig) -> Encode:
    """Encoding in this process."""

    def encode(job: EncodeJob) -> Iterator[ShardResult]:
        import torch

        use_gpu = check_device(cluster.use_gpu, has_gpu=torch.cuda.is_available(), work="encode")
        return encode_here(job, use_gpu=use_gpu)

    return encode


def on_ray(resources: WorkerResources) -> Encode:
    """Encoding on the connected Ray cluster."""
    return lambda job: encode_on_ray(job, resources)


def complete(
    plan: LatentPlan,
    there: dict[str, ShardResult],
    missing: tuple[Shard, ...],
    encode: Encode | None,
    token: str | None,
    stream: TextIO,
) -> Manifest:
    """Encode what is missing, and make the cache whole."""
    results = dict(there)
    if missing:
        assert encode is not None
        plan.folder.remove_leftovers()
        _announce(plan, there, stream)
        # In another order than that of a second process at work on the same, whose shards are not made again.
        shards = random.sample(missing, len(missing))
        stored = plan.folder.sizes()
        job = EncodeJob(
            source=plan.source,
            folder=plan.folder,
            encoding=plan.encoding,
            shards=tuple(shards),
            model=dataclasses.replace(plan.config, hub_token=None),
            replaced=frozenset(shard.name for shard in missing if shard.name in stored),
            batch_size=plan.config.latents_batch_size,
            token=token,
        )
        done = sum(len(shard.rows) for shard in plan.shards) - sum(len(shard.rows) for shard in missing)
        counter = Counter("latents", "images", plan.num_rows, done, stream)
        with explained("Encoding", partial(_how_to_go_on, plan)), closing(counter):
            for result in encode(job):
                results[result.stored.name] = result
                counter.advance(result.stored.num_rows + len(result.bad_samples))
    manifest = _manifest(plan, [results[shard.name] for shard in plan.shards])
    if manifest != plan.manifest:
        _check_all_is_there(plan, manifest)
        try:
            manifest.write(plan.folder)
        except OSError as error:
            raise RunError(f"{plan.folder.name} cannot be written to: {error.strerror or error}") from error
    _report(plan, manifest, stream)
    return manifest


def _manifest(plan: LatentPlan, results: list[ShardResult]) -> Manifest:
    """The table of contents.

    Raises:
        DataError: with the list of bad samples, if there are more than the settings allow.
    """
    bad = tuple(sample for result in results for sample in result.bad_samples)
    allowed = int(plan.config.max_bad_fraction * plan.num_rows) if plan.config.on_bad_sample == "skip" else 0
    if len(bad) > allowed or len(bad) == plan.num_rows:
        file = _file_for(plan, BAD_SAMPLES_FILE)
        file.write_text("".join(f"{sample.reason}\n" for sample in bad), encoding="utf-8")
        lines = shorten([sample.reason for sample in bad], f"bad samples (the whole list: {file})")
        limit = (
            f"more than --max_bad_fraction={plan.config.max_bad_fraction:g} allows; mend the data"
            if plan.config.on_bad_sample == "skip"
            else "mend them, or leave them out with --on_bad_sample skip"
        )
        raise DataError(
            "\n".join(
                [*lines, f"{len(bad):,} of {plan.num_rows:,} samples cannot be used: {limit}. The others are cached"]
            )
        )
    stored = tuple(result.stored for result in results)
    previous = plan.manifest.versions if plan.manifest and plan.manifest.shards == stored else versions()
    return Manifest(plan.encoding, stored, bad, previous)


def _check_all_is_there(plan: LatentPlan, manifest: Manifest) -> None:
    """Raise a UserError if what other machines say they wrote is not in the folder that this one sees."""
    sizes = plan.folder.sizes()
    absent = [shard.name for shard in manifest.shards if sizes.get(shard.name) != shard.num_bytes]
    if absent:
        raise UserError(
            f"--latents_cache_dir={plan.folder.name}: {len(absent):,} of the {len(manifest.shards):,} files that were "
            "written are not there: other machines see another folder of that name. Name one on storage that all share"
        )


def _how_to_go_on(plan: LatentPlan) -> str:
    sizes = plan.folder.sizes()
    done = sum(len(shard.rows) for shard in plan.shards if shard.name in sizes)
    return (
        f"{done:,} of {plan.num_rows:,} images are cached and stand; the same command, or\n"
        f"  {prepare_command(plan.config)}\ngoes on from there."
    )


def _announce(plan: LatentPlan, there: dict[str, ShardResult], stream: TextIO) -> None:
    """Say how much will be written.

    Raises:
        ConfigError: if the disk has no room for it.
    """
    first = load_shard(plan.source, dataclasses.replace(plan.shards[0], rows=plan.shards[0].rows[:SAMPLED_SHARD_ROWS]),
                       plan.config.resolution)  # fmt: skip
    control_bytes = fmean([len(row.conditioning_png) for row in first.rows] or [0.0])
    sample_bytes = plan.posterior_bytes + control_bytes + ROW_OVERHEAD_BYTES
    wanted = round(plan.num_rows * sample_bytes)
    missing = wanted - sum(result.stored.num_bytes for result in there.values())
    stream.write(
        f"latents: {plan.num_rows:,} images at {plan.config.resolution} px need about {file_size(wanted)} in "
        f"{plan.folder.name} (each {file_size(plan.posterior_bytes)} of latents, {file_size(control_bytes)} of "
        f"conditioning image, {file_size(ROW_OVERHEAD_BYTES)} of index)\n"
    )
    free = plan.folder.free_bytes()
    if free is not None and free < missing:
        problem = (
            f"--latents_cache_dir={plan.folder.uri}: {file_size(missing)} are needed there and {file_size(free)} free"
        )
        advice = "name a folder with more room, or train from pixels with --cache_latents off"
        raise ConfigError([f"{problem}; {advice}"])


def _report(plan: LatentPlan, manifest: Manifest, stream: TextIO) -> None:
    skipped = f", {len(manifest.bad_samples):,} bad ones skipped" if manifest.bad_samples else ""
    stream.write(
        f"latents: {manifest.num_rows:,} samples{skipped}, {file_size(manifest.num_bytes)} in {plan.folder.uri} "
        f"({file_size(manifest.num_bytes / max(1, manifest.num_rows))} each)\n"
    )
    if stale := plan.stale():
        names = ", ".join(sorted(stale)[:SHOWN_STALE]) + (", ..." if len(stale) > SHOWN_STALE else "")
        stream.write(
            f"latents: {len(stale):,} files of earlier data are there still ({file_size(sum(stale.values()))}) and may "
            f"be deleted: {names}\n"
        )


def prepare_command(config: TrainConfig, **others: Any) -> str:
    """The command that makes the cache for `config`."""
    names = {*names_that_decide("latents"), *names_with("in_prepare")}
    settings = {name: value for name, value in changed_settings(config).items() if name in names} | others
    if "max_train_samples" in settings:  # the rows are drawn together with the held-out ones
        settings["seed"] = config.seed
        if config.validation_split is not None:
            settings["validation_split"] = config.validation_split
    return "raycontrolnet prepare " + " ".join(
        f"--{name} {shlex.quote(str(value))}" for name, value in settings.items()
    )


def _file_for(plan: LatentPlan, name: str) -> Path:
    """A file for people: in the cache's folder, or where that cannot be written with the temporary ones."""
    if plan.folder.is_local and os.access(plan.folder.uri, os.W_OK):
        return Path(plan.folder.uri) / name
    return Path(tempfile.mkdtemp(prefix="raycontrolnet-")) / name
