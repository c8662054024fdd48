"""The latent cache that was planned, completed: what is missing is encoded, and the manifest written."""

from __future__ import annotations

import dataclasses
import os
import random
import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TextIO

from raycontrolnet.cluster.resources import WorkerResources
from raycontrolnet.cluster.shared_files import check_nodes_see
from raycontrolnet.cluster.versions import check_versions
from raycontrolnet.config.checks import versions
from raycontrolnet.data.augmentation import RANDOM
from raycontrolnet.data.sources import shared_files
from raycontrolnet.errors import ConfigError, DataError, RunError, UserError, explained
from raycontrolnet.latents.cache import ROW_OVERHEAD_BYTES, LatentCache
from raycontrolnet.latents.encode import encode_here, encode_on_ray
from raycontrolnet.latents.manifest import Manifest, Shard
from raycontrolnet.latents.plan import LatentPlan, prepare_command
from raycontrolnet.latents.shards import EncodeJob, ShardResult, load_shard
from raycontrolnet.model.problems import model_files
from raycontrolnet.storage.files import replace_text
from raycontrolnet.storage.folder import writing_to
from raycontrolnet.storage.quota import quota_forbids
from raycontrolnet.text import Counter, file_size, shorten

SAMPLED_SHARD_ROWS = 4
"""Rows whose conditioning images are compressed to estimate the cache's size."""
SHOWN_STALE = 5
SEVERAL_MACHINES = "the cluster has several machines: name a folder that all of them see, or an object store's URI"
BAD_SAMPLES_FILE = "bad_samples.txt"


def ensure(plan: LatentPlan, workers: WorkerResources | None, stream: TextIO) -> LatentCache:
    """Return the cache that was planned, encoding what is missing.

    Args:
        workers: of the connected Ray; None to encode in this process.

    Raises:
        UserError, RunError: as `prepare`.
    """
    manifest = complete(plan, *plan.survey(), workers, stream)
    return LatentCache.of(plan.folder, manifest, plan.shards)


def complete(
    plan: LatentPlan,
    there: dict[str, ShardResult],
    missing: tuple[Shard, ...],
    workers: WorkerResources | None,
    stream: TextIO,
) -> Manifest:
    """Encode the shards that are missing, and write the manifest. See `LatentPlan.survey` and `ensure`."""
    results = there | _encode(plan, there, missing, workers, stream) if missing else there
    manifest = _manifest(plan, [results[shard.name] for shard in plan.shards])
    if manifest != plan.manifest:
        _check_all_is_there(plan, manifest)
        with writing_to(plan.folder.name):
            manifest.write(plan.folder)
    _report(plan, manifest, stream)
    return manifest


def _encode(
    plan: LatentPlan,
    there: dict[str, ShardResult],
    missing: tuple[Shard, ...],
    workers: WorkerResources | None,
    stream: TextIO,
) -> dict[str, ShardResult]:
    """Encode the shards that are missing; return the results by name."""
    plan.folder.check_writable()
    plan.folder.remove_leftovers()
    _announce(plan, there, stream)
    stored = plan.folder.sizes()
    job = EncodeJob(
        source=plan.source,
        files=shared_files(plan.source, plan.config),
        folder=plan.folder,
        encoding=plan.encoding,
        model=dataclasses.replace(plan.config, hub_token=None),
        replaced=frozenset(shard.name for shard in missing if shard.name in stored),
        batch_size=plan.config.latents_batch_size,
        token=plan.token,
    )
    if workers:
        check_versions()
        check_nodes_see([job.files])
        check_nodes_see(model_files(plan.config), of=workers.fit_on)
    # A second process at work on the same cache then seldom makes the same shard.
    shuffled = random.sample(missing, len(missing))
    results = {}
    done = plan.num_rows - sum(len(shard.rows) for shard in missing)
    counter = Counter("latents", "images", plan.num_rows, done, stream)
    with explained("Encoding", partial(_how_to_go_on, plan)), closing(counter):
        encoded = encode_on_ray(job, shuffled, workers) if workers else encode_here(job, shuffled, plan.config)
        for result in encoded:
            results[result.stored.name] = result
            counter.advance(result.stored.num_rows + len(result.bad_samples))
    return results


def _manifest(plan: LatentPlan, results: list[ShardResult]) -> Manifest:
    """Return the manifest.

    Raises:
        DataError: with the list of bad samples, if there are more than the settings allow.
    """
    bad = tuple(sample for result in results for sample in result.bad_samples)
    allowed = int(plan.config.max_bad_fraction * plan.num_rows) if plan.config.on_bad_sample == "skip" else 0
    if len(bad) > allowed or len(bad) == plan.num_rows:
        file = report_path(plan, BAD_SAMPLES_FILE)
        replace_text(file, "".join(f"{sample.reason}\n" for sample in bad))
        lines = shorten([sample.reason for sample in bad], f"bad samples (the whole list: {file})")
        limit = (
            f"more than --max_bad_fraction={plan.config.max_bad_fraction:g} allows; fix the data, or raise it"
            if plan.config.on_bad_sample == "skip"
            else "fix them, or skip them with --on_bad_sample skip"
        )
        lines += [f"{len(bad):,} of {plan.num_rows:,} samples cannot be used: {limit}. The others are cached"]
        raise DataError("\n".join(lines))
    stored = tuple(result.stored for result in results)
    previous = plan.manifest.versions if plan.manifest and plan.manifest.shards == stored else versions()
    return Manifest(plan.encoding, stored, bad, previous)


def _check_all_is_there(plan: LatentPlan, manifest: Manifest) -> None:
    """Check that this machine sees the files that others have written.

    Raises:
        UserError: if it does not.
    """
    sizes = plan.folder.sizes()
    absent = [shard.name for shard in manifest.shards if sizes.get(shard.name) != shard.num_bytes]
    if absent:
        raise UserError(
            f"--latents_cache_dir={plan.folder.name}: {len(absent):,} of the {len(manifest.shards):,} files that were "
            "written are not there: other machines see another folder of that name. Name one on storage that all share"
        )


def _how_to_go_on(plan: LatentPlan) -> str:
    try:
        sizes = plan.folder.sizes()
    except (UserError, RunError):  # a store that is away; the work has failed for another reason, or for this one
        return "What is cached stands; the same command goes on from there."
    done = sum(len(shard.rows) for shard in plan.shards if shard.name in sizes)
    return (
        f"{done:,} of {plan.num_rows:,} images are cached and stand; the same command, or\n"
        f"  {prepare_command(plan.config)}\ngoes on from there."
    )


def _announce(plan: LatentPlan, there: dict[str, ShardResult], stream: TextIO) -> None:
    """Announce how much will be written.

    Raises:
        ConfigError: if the disk has no room for it.
    """
    sizes = plan.shards[0].sizes
    few = dataclasses.replace(
        plan.shards[0],
        rows=plan.shards[0].rows[:SAMPLED_SHARD_ROWS],
        sizes=sizes and sizes[:SAMPLED_SHARD_ROWS],
    )
    first = load_shard(plan.source, few, plan.encoding)
    control_bytes = fmean([len(row.conditioning_png) for row in first.rows] or [0.0])
    sample_bytes = plan.posterior_bytes + control_bytes + ROW_OVERHEAD_BYTES
    wanted = round(plan.num_rows * sample_bytes)
    both = ", also of the mirror image" if plan.encoding.random_flip else ""
    missing = wanted - sum(result.stored.num_bytes for result in there.values())
    stream.write(
        f"latents: {plan.num_rows:,} images at {plan.config.resolution} px need about {file_size(wanted)} in "
        f"{plan.folder.name} (each {file_size(plan.posterior_bytes)} of latents{both}, {file_size(control_bytes)} of "
        f"conditioning image, {file_size(ROW_OVERHEAD_BYTES)} of index)\n"
    )
    if plan.encoding.crop == RANDOM:
        stream.write("latents: each row is cropped once, at random, the same in every run (--crop random)\n")
    free = plan.folder.free_bytes()
    lack = None
    if free is not None and free < missing:
        lack = f"{file_size(missing)} are needed there and {file_size(free)} free"
    elif plan.folder.is_local and quota_forbids(Path(plan.folder.uri), missing):
        lack = f"{file_size(missing)} are needed there, which your quota does not allow"
    if lack:
        problem = f"--latents_cache_dir={plan.folder.uri}: {lack}"
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
            f"latents: {len(stale):,} files of earlier data are still there ({file_size(sum(stale.values()))}) and may "
            f"be deleted: {names}\n"
        )


def report_path(plan: LatentPlan, name: str) -> Path:
    """Return the path of a file for people: in the cache's folder, or else in a temporary one."""
    if plan.folder.is_local and os.access(plan.folder.uri, os.W_OK):
        return Path(plan.folder.uri) / name
    return Path(tempfile.mkdtemp(prefix="raycontrolnet-")) / name
