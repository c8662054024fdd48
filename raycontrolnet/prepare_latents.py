"""The driver of the latent cache: `prepare(config) -> PrepareResult`, and what `fit` does of it by itself.

Plans which shards the cache should have, encodes those that are missing, and writes the manifest that makes it whole.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from raycontrolnet.cluster import logging_to, ray_session, shown_on
from raycontrolnet.config import TrainConfig, changed_settings
from raycontrolnet.data.columns import shortened
from raycontrolnet.data.encoding import ShardResult, load_shard
from raycontrolnet.data.latents import ROW_OVERHEAD_BYTES
from raycontrolnet.data.manifest import BadSample, Manifest, Shard
from raycontrolnet.encode_latents import EncodeJob, encode_here, encode_on_ray
from raycontrolnet.errors import ConfigError, DataError, Interrupted, RunError, UserError, in_one_line, root_cause
from raycontrolnet.latent_plan import LatentPlan
from raycontrolnet.preflight import check_inputs, versions, with_absolute_paths
from raycontrolnet.resources import WorkerResources, worker_resources
from raycontrolnet.run.counter import Counter
from raycontrolnet.settings import CacheConfig, DataConfig, ModelConfig

logger = logging.getLogger(__name__)

SAMPLED_SHARD_ROWS = 4
"""Rows whose conditioning images are compressed to estimate the cache's size."""
SHOWN_STALE = 5
SEVERAL_MACHINES = "the cluster has several machines: name a folder that all of them see, or an object store's URI"
BAD_SAMPLES_FILE = "bad_samples.txt"

Encode = Callable[[EncodeJob], Iterator[ShardResult]]


@dataclass(frozen=True)
class PrepareResult:
    """What `prepare` left."""

    folder: str
    num_samples: int
    """In the cache."""
    num_bytes: int
    bad_samples: tuple[BadSample, ...]
    """Those that were skipped."""
    num_encoded: int
    """Samples that were encoded now; the others were there."""
    seconds: float


def prepare(config: TrainConfig, *, stream: TextIO | None = None) -> PrepareResult:
    """Encode every image of the data into the latent cache, or those that are missing there.

    Uses Ray as `fit` does. Killed at any moment, it goes on where it stopped when it is run again.

    Args:
        config: the settings of the run that will use the cache.
        stream: where progress is shown; standard error by default.

    Raises:
        UserError: bad settings, data or models (exit code 2 on the command line).
        RunError: it failed, as on a full disk; what was written stands (exit code 1).
        Interrupted: Ctrl-C (exit code 130).
    """
    with shown_on(stream) as shown:
        try:
            return _prepare(config, shown)
        except KeyboardInterrupt:
            raise Interrupted("Interrupted. What is cached stands; the same command goes on from there.") from None


def _prepare(config: TrainConfig, stream: TextIO) -> PrepareResult:
    started = time.monotonic()
    config = with_absolute_paths(config, Path(config.output_dir).expanduser().resolve())
    source, token = check_inputs(config)
    plan = LatentPlan.of(config, source, token)
    plan.check_encoding(prepare_command)
    if changes := plan.changes():
        stream.write(f"latents: the data changed since ({changes}); what is new will be encoded\n")
    there, missing = plan.survey()
    with logging_to(_file_for(plan, "prepare.log")):
        if not missing:
            manifest = complete(plan, there, (), None, token, stream)
        elif config.worker_range == (0, 0):
            manifest = complete(plan, there, missing, here(config), token, stream)
        else:
            with ray_session(config.address):
                resources = worker_resources(config)
                if not resources.one_machine and config.latents_cache_dir is None:
                    raise ConfigError([f"--latents_cache_dir: {SEVERAL_MACHINES}"])
                manifest = complete(plan, there, missing, on_ray(resources), token, stream)
    return PrepareResult(
        folder=plan.folder.uri,
        num_samples=manifest.num_rows,
        num_bytes=manifest.num_bytes,
        bad_samples=manifest.bad_samples,
        num_encoded=sum(len(shard.rows) for shard in missing),
        seconds=time.monotonic() - started,
    )


def here(config: TrainConfig) -> Encode:
    """Encoding in this process."""

    def encode(job: EncodeJob) -> Iterator[ShardResult]:
        import torch

        use_gpu = torch.cuda.is_available() if config.use_gpu is None else config.use_gpu
        if use_gpu and not torch.cuda.is_available():
            raise ConfigError(["--use_gpu=True: there is no GPU here; leave the flag out to encode on the CPU"])
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
        with _failures_explained(plan, counter):
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
        lines = shortened([sample.reason for sample in bad], f"bad samples (the whole list: {file})")
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


@contextmanager
def _failures_explained(plan: LatentPlan, counter: Counter) -> Iterator[None]:
    """Turn whatever ends the encoding early into one paragraph that says what stands and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"Interrupted. {_how_to_go_on(plan)}") from None
    except Exception as error:
        logger.exception("encoding failed")
        cause = root_cause(error)
        if isinstance(cause, UserError):
            raise cause from error
        reason = str(cause) if isinstance(cause, RunError) else in_one_line(cause)
        raise RunError(f"Encoding failed: {reason}.\n{_how_to_go_on(plan)}") from error
    finally:
        counter.close()


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
        f"latents: {plan.num_rows:,} images at {plan.config.resolution} px need about {_size(wanted)} in "
        f"{plan.folder.name} (each {_size(plan.posterior_bytes)} of latents, {_size(control_bytes)} of conditioning "
        f"image, {_size(ROW_OVERHEAD_BYTES)} of index)\n"
    )
    free = plan.folder.free_bytes()
    if free is not None and free < missing:
        problem = f"--latents_cache_dir={plan.folder.uri}: {_size(missing)} are needed there and {_size(free)} free"
        advice = "name a folder with more room, or train from pixels with --cache_latents off"
        raise ConfigError([f"{problem}; {advice}"])


def _report(plan: LatentPlan, manifest: Manifest, stream: TextIO) -> None:
    skipped = f", {len(manifest.bad_samples):,} bad ones skipped" if manifest.bad_samples else ""
    stream.write(
        f"latents: {manifest.num_rows:,} samples{skipped}, {_size(manifest.num_bytes)} in {plan.folder.uri} "
        f"({_size(manifest.num_bytes / max(1, manifest.num_rows))} each)\n"
    )
    if stale := plan.stale():
        names = ", ".join(sorted(stale)[:SHOWN_STALE]) + (", ..." if len(stale) > SHOWN_STALE else "")
        stream.write(
            f"latents: {len(stale):,} files of earlier data are there still ({_size(sum(stale.values()))}) and may be "
            f"deleted: {names}\n"
        )


def prepare_command(config: TrainConfig, **others: Any) -> str:
    """The command that makes the cache for `config`."""
    names = {field.name for group in (ModelConfig, DataConfig, CacheConfig) for field in dataclasses.fields(group)}
    names -= {"controlnet_model_name_or_path", "proportion_empty_prompts", "tokenizer_name", "cache_latents"}
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


def _size(num_bytes: float) -> str:
    """65536 -> 65.5 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
