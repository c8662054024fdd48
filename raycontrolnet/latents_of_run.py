"""Whether a run trains from cached latents, and from which: decided before Ray starts, made once it has."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TextIO

from raycontrolnet.cluster import on_a_cluster
from raycontrolnet.config import TrainConfig
from raycontrolnet.data.latents import LatentCache
from raycontrolnet.data.manifest import Manifest
from raycontrolnet.data.sources import Source
from raycontrolnet.errors import ConfigError
from raycontrolnet.latent_plan import LatentPlan
from raycontrolnet.preflight import CheckedRun
from raycontrolnet.prepare_latents import SEVERAL_MACHINES, Encode, complete, prepare_command

logger = logging.getLogger(__name__)


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
