"""Checks of a run that goes on from a checkpoint: what must fit it, and what is no longer as it was."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from contextlib import suppress

from raycontrolnet.config.objective_settings import ZERO_SNR, ObjectiveConfig
from raycontrolnet.config.optimizer_settings import AveragesConfig, OptimizerConfig
from raycontrolnet.config.settings import OptimConfig
from raycontrolnet.config.train_config import TrainConfig, names_that_decide, public_settings
from raycontrolnet.data.buckets import Buckets
from raycontrolnet.data.source import Source
from raycontrolnet.errors import ConfigError
from raycontrolnet.model.base_family import config_of_denoiser
from raycontrolnet.model.components import OTHER_BASE, RESUME
from raycontrolnet.model.files import local_files
from raycontrolnet.model.optimizers import state_problem
from raycontrolnet.model.problems import mismatch
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.storage.run_folder import RunFolder

logger = logging.getLogger(__name__)

TRAINING = (ObjectiveConfig, OptimConfig, OptimizerConfig, AveragesConfig)
"""Groups of settings that decide how weights are learned."""


def with_held_out_rows(config: TrainConfig, num_rows: int, start: checkpoints.Checkpoint | None) -> TrainConfig:
    """Return the settings with as many held-out rows as the run that is continued had, unless they give a number.

    Raises:
        ConfigError: if no row would be left to train on.
    """
    before = start.manifest.get("held_out", 0) if start else None
    if config.validation_split is None and before not in (None, config.num_held_out(num_rows)):
        config = dataclasses.replace(config, validation_split=before)
    if config.num_held_out(num_rows) >= num_rows:
        problem = f"--validation_split={config.validation_split:g}: leaves none of the {num_rows:,} rows to train on"
        raise ConfigError([f"{problem}; hold out fewer, or 0"])
    return config


def cached_as_before(config: TrainConfig, start: checkpoints.Checkpoint, enough_uses: float) -> bool | None:
    """Return whether a run that decides by itself trains from a latent cache, as the run that it continues did.

    None where that is to be decided anew: the run before had no use for a cache or another one, as of other data, or
    this one must have one or names another place for it.

    Args:
        enough_uses: of an image, above which latents are cached.
    """
    before, now = start.manifest.get("settings", {}), public_settings(config)
    if any(before.get(name, now[name]) != now[name] for name in names_that_decide("latents")):
        return None
    if start.manifest.get("cached"):
        return True
    wanted = before.get("cache_latents") == "auto" and start.manifest.get("uses_of_a_sample", 0.0) > enough_uses
    place = now["latents_cache_dir"]
    if wanted and config.on_bad_sample != "skip" and before.get("latents_cache_dir") == place:
        return False  # as where there was no place that all machines saw, or no seed
    return None


def checkpoint_problems(config: TrainConfig, start: checkpoints.Checkpoint, token: str | None) -> Iterator[str]:
    """Yield a problem if the checkpoint's ControlNet does not fit the base model, or its state another optimizer."""
    controlnet = local_files(start.path / checkpoints.CONTROLNET_FOLDER).read_json("config.json")
    if problem := mismatch(controlnet, config_of_denoiser(config, token)):
        yield f"--{RESUME}={config.resume_from_checkpoint}: {start.path.name} was {problem}; {OTHER_BASE}"
    if problem := state_problem(config, start.manifest.get("settings")):
        weights = start.path / checkpoints.CONTROLNET_FOLDER
        anew = f"start anew from its weights in another --output_dir: --controlnet_model_name_or_path {weights}"
        yield f"--{RESUME}={config.resume_from_checkpoint}: {start.path.name} {problem}, or {anew}"


def warn_of_changes(config: TrainConfig, start: checkpoints.Checkpoint, source: Source) -> None:
    """Log what differs from the run that wrote the checkpoint, and changes what is learned."""
    for what, now in (("seed", config.seed), ("data", source.fingerprint())):
        if start.manifest[what] != now:
            logger.warning("%s was made with another %s: the order of samples changes", start.path, what)
    before = start.manifest.get("settings", {})
    weights = before.get("data_weights")
    if (weights and tuple(weights)) != config.data_weights:
        logger.warning("%s was made with other --data_weights: the order of samples changes", start.path)
    if before.get(ZERO_SNR, False) != getattr(config, ZERO_SNR):
        logger.warning("%s was trained with another noise schedule: its run had another --%s", start.path, ZERO_SNR)
    if start.manifest.get("held_out", 0) != config.num_held_out(len(source)):
        logger.warning(
            "%s was made with other rows held out: it has seen rows that are measured now, and the order changes",
            start.path,
        )


def changed_training(config: TrainConfig, start: checkpoints.Checkpoint) -> Iterator[str]:
    """Yield what a run that goes on does otherwise than that of its checkpoint, in words for the terminal."""
    before, now = start.manifest.get("settings", {}), public_settings(config)
    changed = [
        f"--{name}={before[name]}"
        for group in TRAINING
        for name in (field.name for field in dataclasses.fields(group))
        if name in before and before[name] != now[name] and name not in ("use_ema", ZERO_SNR)  # said apart
    ]
    if changed:
        yield f"{start.path.name} was trained with {', '.join(changed)}; the run goes on with the settings given now"
    if start.has_averages and not config.use_ema:
        yield f"the averages of {start.path.name} are left out; --use_ema goes on with them"


def check_buckets(config: TrainConfig, buckets: Buckets | None, start: checkpoints.Checkpoint) -> None:
    """Warn if batches after the checkpoint are of other rows than they would have been.

    Raises:
        ConfigError: if batches after its start would be of two buckets.
    """
    sizes = [list(size) for size in buckets.sizes] if buckets else None
    if start.manifest.get("buckets") != sizes:
        logger.warning("%s was made with other aspect buckets: the order of samples changes", start.path)
    if buckets is None or len(buckets.sizes) == 1:
        return
    size, before = config.train_batch_size, start.manifest.get("settings", {}).get("train_batch_size")
    if start.samples % size:
        problem = f"--train_batch_size={size}: does not divide the {start.samples:,} samples of {start.path.name}"
        fits = math.gcd(start.samples, before or size)
        raise ConfigError([f"{problem}, and a batch must be of one aspect bucket; use {fits}, or a divisor of it"])
    if size != before:
        logger.warning("%s was made with --train_batch_size=%s: the order of samples changes", start.path, before)


def how_to_go_on(config: TrainConfig, folder: RunFolder) -> str:
    """Return what stands of the run in `folder`, and how to go on, where no more is known of it than its settings."""
    again = f"--resume_from_checkpoint {config.resume_from_checkpoint or 'latest'}"
    if folder.is_stored:  # which may not answer: nothing is asked of it
        return f"The checkpoints in {folder.shown} stand: go on with {again}."
    with suppress(OSError):
        if last := folder.latest():
            return f"The checkpoints in {folder.shown} stand, up to that of update {last.step}: go on with {again}."
    return f"No checkpoint is in {folder.shown} yet: run the same command again."
