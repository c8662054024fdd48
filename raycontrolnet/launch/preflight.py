"""Checks before Ray starts and models are read, all problems at once."""

from __future__ import annotations

import dataclasses
import logging
import secrets
from typing import TextIO

import torch

from raycontrolnet.cluster.resources import WorkerResources
from raycontrolnet.cluster.session import runs_on_a_cluster
from raycontrolnet.cluster.shared_files import check_nodes_see
from raycontrolnet.cluster.versions import check_versions
from raycontrolnet.config.checks import (
    check_device,
    collected,
    find_token,
    missing_extras,
    unwritable,
)
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.image_sizes import find_buckets
from raycontrolnet.data.sources import shared_files
from raycontrolnet.errors import ConfigError
from raycontrolnet.hub import push
from raycontrolnet.latents.ensure import SEVERAL_MACHINES, ensure
from raycontrolnet.latents.inputs import check_inputs
from raycontrolnet.latents.plan import LatentPlan, lacks_seed, prepare_command
from raycontrolnet.launch.checked_run import CheckedRun
from raycontrolnet.launch.resumed_run import (
    cached_as_before,
    check_buckets,
    checkpoint_problems,
    warn_of_changes,
    with_held_out_rows,
)
from raycontrolnet.model.base_family import bucket_warning
from raycontrolnet.model.families.registry import families
from raycontrolnet.model.optimizers import try_optimizer
from raycontrolnet.model.problems import model_files
from raycontrolnet.model.size import controlnet_bytes_at_least
from raycontrolnet.sampling import images
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.storage.resume import resolve
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training import validation
from raycontrolnet.training.room import check_room
from raycontrolnet.training.schedule import Schedule
from raycontrolnet.training.trackers import check_trackers

logger = logging.getLogger(__name__)

ENOUGH_USES = 1.1
"""Uses of an image above which latents are cached. An image that is used r times is encoded once in place of r times.
The VAE is a third of a step's work (1.1 of 3.4 TFLOP for Stable Diffusion 1.5 at 512 px), so that a cache saves
(r - 1) / 3r of a run: 3% here, about what it costs to read each image once more, to write, and to load the VAE.
The last batch of an epoch is filled from the next one: even a run of one epoch has r a little above 1."""


def check(config: TrainConfig, folder: RunFolder) -> CheckedRun:
    """Check everything that can be checked before Ray starts and models are read.

    Raises:
        ConfigError: with the problems of settings, model folders, output folder, validation images and data together.
    """
    problems = check_trackers(config)
    token, elsewhere = find_token(config.hub_token), runs_on_a_cluster(config)
    if not elsewhere:
        with collected(problems):
            check_device(config.use_gpu, config, has_gpu=torch.cuda.is_available())
    problems += missing_extras(config, problems)
    with collected(problems):
        try_optimizer(config)
    problems += push.check_push(config, folder.shown)
    if problem := unwritable(folder.path, "output_dir"):
        problems.append(problem)
    else:
        checkpoints.remove_leftovers(folder.path)
    start = None
    with collected(problems):
        start = resolve(config.resume_from_checkpoint, folder)
    with collected(problems):
        images.check(config.validation_pairs, validation.FLAG)
    inputs = check_inputs(
        config,
        token,
        problems,
        elsewhere=elsewhere,
        skip_bad=config.on_bad_sample == "skip",
        of_start=checkpoint_problems(config, start, token) if start else (),
    )
    source, family = inputs.source, inputs.family or families()[0]
    config = with_held_out_rows(config, len(source), start)
    not_cached_because = None if start else no_cache_because(config, len(source))
    if config.seed is None:
        config = dataclasses.replace(config, seed=start.seed if start else secrets.randbelow(2**31))
    if start is not None:
        warn_of_changes(config, start, source)
    buckets = find_buckets(config, source, family.resolution_multiple)
    if warning := bucket_warning(buckets, family):
        logger.warning("%s", warning)
    if start is not None:
        check_buckets(config, buckets, start)
    files = shared_files(source, config)
    run = CheckedRun(config, folder, source, family, start, token, not_cached_because, buckets=buckets, files=files)
    if not folder.is_stored:
        weights = controlnet_bytes_at_least(config)
        check_room(folder, weights, run.schedule(start), start.step if start else 0, config, least=True)
    return run


def no_cache_because(config: TrainConfig, num_rows: int) -> str | None:
    """Return why every run of these settings would need another latent cache, in words; None if none would.

    Raises:
        ConfigError: if the latents are to be cached all the same.
    """
    if config.seed is not None:
        return None
    if config.num_used(num_rows) < num_rows:
        if config.cache_latents == "on":
            raise ConfigError([f"--max_train_samples={config.max_train_samples}: needs --seed, to cache these rows"])
        return "--max_train_samples draws other rows without --seed"
    if needed := lacks_seed(config, config.num_held_out(num_rows)):
        if _needs_cache(config):
            raise ConfigError([": ".join(needed)])
        return " ".join(needed).replace("=", " ", 1)
    return None


def _needs_cache(config: TrainConfig) -> bool:
    """Check whether a run must have its cache: bad samples must be known before the first update."""
    return config.cache_latents == "on" or config.on_bad_sample == "skip"


def choose_latents(run: CheckedRun, stream: TextIO, *, reused: bool = False) -> CheckedRun:
    """Return the run with the cache that it will train from, as far as it can be chosen before Ray starts.

    Args:
        reused: whether other runs will use the cache as well.

    Raises:
        ConfigError: if there is a cache that does not fit.
    """
    config = run.config
    if run.buckets:
        stream.write("".join(f"{line}\n" for line in run.buckets.table()))
        if config.compile and len(run.buckets.sizes) > 1:
            stream.write("--compile: each size is compiled when its first batch comes, which takes some minutes each\n")
    if not wants_latents(config, run.schedule(None), run.start, reused=reused):
        if config.cache_latents == "auto" and config.latents_cache_dir:
            uses = run.schedule(None).uses_of_a_sample
            why = "no image is used twice" if uses <= 1 else f"an image is used {uses:.2f} times"
            if run.start and uses > ENOUGH_USES:
                why = f"the run of {run.start.path.name} did not"
            stream.write(f"latents: not cached, as {why}; --cache_latents on caches them\n")
        return run
    if run.not_cached_because:
        stream.write(f"latents: not cached, because {run.not_cached_because}\n")
        return run
    if config.latents_cache_dir is None and runs_on_a_cluster(config):
        return dataclasses.replace(run, cached=True)  # only the cluster shows whether it is a single machine
    return dataclasses.replace(run, cached=True, latents=_fitting_cache(run, stream))


def wants_latents(
    config: TrainConfig, schedule: Schedule, start: checkpoints.Checkpoint | None = None, *, reused: bool = False
) -> bool:
    """Check whether a run trains from cached latents, if there is a place for them.

    Args:
        schedule: of the whole run.
        start: where it goes on from.
        reused: whether other runs will use the cache as well.
    """
    before = cached_as_before(config, start, ENOUGH_USES) if start else None
    if config.cache_latents == "auto" and before is not None:
        return before
    reuses_rows = reused or schedule.uses_of_a_sample > ENOUGH_USES
    # Bad samples must be known before the first update.
    wanted = {"on": True, "off": False, "auto": reuses_rows or config.on_bad_sample == "skip"}
    return wanted[config.cache_latents]


def _fitting_cache(run: CheckedRun, stream: TextIO, *, one_machine: bool = True) -> LatentPlan | None:
    """Return the latent cache for a run that wants one; None if there is no place that all machines see.

    Looks at what is there, and needs no Ray.

    Raises:
        ConfigError: if the folder holds a cache that does not fit, or the run needs a cache and there is no place.
        UserError: if the folder or the VAE cannot be used.
    """
    config = run.config
    if config.latents_cache_dir is None and not one_machine:
        if _needs_cache(config):
            raise ConfigError([f"--latents_cache_dir: {SEVERAL_MACHINES}"])
        stream.write(f"latents: not cached; to train faster, give --latents_cache_dir ({SEVERAL_MACHINES})\n")
        return None
    plan = LatentPlan.of(config, run.source, run.family, run.token, run.buckets)
    plan.check_encoding()
    if changes := plan.changes():
        problem = f"the data changed since its latents were cached in {plan.folder.uri}: {changes}"
        raise ConfigError([f"{problem}. Encode what is new with:\n  {prepare_command(config)}"])
    return plan


def ensure_latents(run: CheckedRun, workers: WorkerResources | None, stream: TextIO) -> CheckedRun:
    """Return the run with its cache complete, or as it is if it trains from pixels; look at the nodes.

    Args:
        workers: of the connected Ray; None to encode in this process.

    Raises:
        ConfigError: if the run needs a cache, and there is no place for it that all machines see; or if a node has
            other versions, or does not see the data, the cache or the models.
        UserError, RunError: as `prepare`.
    """
    if workers is None:
        return _with_cache(run, None, stream)
    check_versions()
    check_nodes_see(model_files(run.config), of=workers.fit_on)
    run = _with_cache(run, workers, stream)
    check_nodes_see([run.files] if run.files else [])
    return run


def _with_cache(run: CheckedRun, workers: WorkerResources | None, stream: TextIO) -> CheckedRun:
    latents = run.latents
    if run.cached and latents is None:
        latents = _fitting_cache(run, stream, one_machine=workers is None or workers.one_machine)
    if latents is None:
        return run
    cache = ensure(latents, workers, stream)
    run = dataclasses.replace(run, cache=cache, files=cache.files(), latents=None)
    if run.start is not None and run.start.manifest.get("left_out", []) != list(run.bad_rows):
        logger.warning("%s was made with other bad samples left out: the order of samples changes", run.start.path)
    return run
