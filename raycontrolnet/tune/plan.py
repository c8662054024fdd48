"""Plan of a sweep, checked before Ray starts, and what its trials share once Ray runs."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from raycontrolnet.cluster.resources import WorkerResources
from raycontrolnet.config.checks import absolute, versions, with_absolute_paths
from raycontrolnet.config.space import Dimension, Space, combinations, num_trials, to_grammar
from raycontrolnet.config.sweep_config import OBJECTIVES, SweepConfig, SweepSettings
from raycontrolnet.config.sweepable import cache_settings
from raycontrolnet.config.train_config import TrainConfig, names_that_decide, names_with, public_settings
from raycontrolnet.data.mixture import in_words as sources_in_words
from raycontrolnet.errors import ConfigError
from raycontrolnet.launch.checked_run import CheckedRun
from raycontrolnet.launch.precision import in_words, resolve, workers_have_bf16
from raycontrolnet.launch.preflight import check, choose_latents, ensure_latents
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.tune import checks
from raycontrolnet.tune.concurrency import TrialSlots
from raycontrolnet.tune.lease import SweepLease
from raycontrolnet.tune.recorder import mark_interrupted
from raycontrolnet.tune.records import TrialRecord, read_records, read_sweep
from raycontrolnet.tune.store_sync import open_sweep
from raycontrolnet.tune.trial import Shared, cache_key


@dataclass(frozen=True)
class SweepPlan:
    """A sweep whose input has been checked."""

    config: SweepConfig
    """As given."""
    folder: RunFolder
    space: Space
    num_trials: int
    runs: Mapping[str, CheckedRun]
    """The sweep's run for each latent cache (see `cache_key`); trials differ from it in the settings they try."""
    records: Sequence[TrialRecord]
    """Trials from before the sweep was resumed."""
    total_updates: int
    grace_period: int | None
    """Updates before a trial may be stopped; None if none is."""
    mixed_precision: str | None = None
    """Precision of trials that name none, in an earlier part of the sweep; None for fp32, or without such a part."""

    @property
    def sweep_dir(self) -> Path:
        """The sweep's folder on this machine."""
        return self.folder.path

    @property
    def run(self) -> CheckedRun:
        """The run of the first cache."""
        return next(iter(self.runs.values()))

    @property
    def train(self) -> TrainConfig:
        """The settings that trials share, with absolute paths and a seed; those in the space are replaced."""
        return self.run.config

    @property
    def mode(self) -> str:
        return OBJECTIVES[self.config.objective]

    @property
    def begun(self) -> list[TrialRecord]:
        """Trials of an earlier part of the sweep that count, in the order in which they continue: ended ones first."""
        counted = [record for record in self.records if record.state != "failed"]
        return sorted(counted, key=lambda record: (not record.ended, record.index))

    @property
    def new_indices(self) -> list[int]:
        """Indices of the trials that have not begun."""
        return sorted(set(range(self.num_trials)).difference(record.index for record in self.records))

    @property
    def num_left(self) -> int:
        """Number of trials that are still to be trained or resumed."""
        return sum(not record.ended for record in self.records) + len(self.new_indices)

    def facts(self) -> dict[str, Any]:
        """Return the content of sweep.json."""
        config = self.config
        names = ("searcher", "scheduler", "objective", "num_samples", "reduction_factor")
        return {
            "name": self.folder.name,
            **{name: getattr(config, name) for name in names},
            "mode": self.mode,
            "space": to_grammar(self.space),
            "seed": self.train.seed,
            "num_trials": self.num_trials,
            "total_updates": self.total_updates,
            "validation_steps": self.train.validation_steps,
            "grace_period": self.grace_period,
            "settings": public_settings(self.train),
            "mixed_precision": self.mixed_precision,
            "versions": versions(),
        }

    def device_settings(self) -> Iterator[TrainConfig]:
        """Yield the settings with each value in the space that may need a GPU."""
        yield self.train
        for name in names_with("gpu_only"):
            for settings in combinations(self.space, [name]):
                yield dataclasses.replace(self.train, **settings)

    def config_of(self, record: TrialRecord, mixed_precision: str | None) -> TrainConfig:
        """Return the settings of a trial, as `fit` takes them for the same run.

        Args:
            mixed_precision: that of trials that name none.
        """
        return checks.settings_of_trial(self.train, record.settings, mixed_precision)


def plan_sweep(config: SweepConfig, stream: TextIO) -> SweepPlan:
    """Check everything that can be checked before Ray starts and models are read.

    Raises:
        ConfigError: with what is wrong.
    """
    train = with_absolute_paths(config.train)
    folder = open_sweep(train.output_dir, train.logging_pattern)
    before, space = read_sweep(folder.path), config.parsed_space
    if before and not config.resume:
        instead = "resume it with --resume, or name another folder"
        raise ConfigError([f"--output_dir={folder.shown}: holds a sweep; {instead}"])
    if config.resume and not before:
        stream.write(f"sweep: there is nothing to resume in {folder.shown}: a new sweep starts\n")
    train = _shared_settings(train, folder, before)
    space = {name: _with_absolute_paths(name, dimension) for name, dimension in space.items()}
    changed = checks.differences(before, config, public_settings(train), space)
    problems = [*changed, *checks.problems(config, space), *checks.optimizer_problems_of(train, space)]
    problems = problems or checks.model_problems_of(train, space) or checks.size_problems_of(train, space)
    if problems or (problems := checks.objective_problems_of(train, space)):
        raise ConfigError(problems)
    runs = _runs(train, space, folder, stream)
    for run in runs.values():
        if problem := checks.objective_problem(config.objective, run):
            raise ConfigError([problem])
    total_updates = max(total for run in runs.values() for total in _totals(run, space))
    for sources in dict.fromkeys(sources_in_words(run.source, run.config) for run in runs.values()):
        stream.write(f"data: {sources}\n" if sources else "")
    for warning in dict.fromkeys(checks.warnings(config, train, space, total_updates)):
        stream.write(f"sweep: {warning}\n")
    return SweepPlan(
        config=config,
        folder=folder,
        space=space,
        num_trials=num_trials(space, config.num_samples),
        runs=runs,
        records=[mark_interrupted(folder.path, record) for record in read_records(folder.path)] if before else [],
        total_updates=total_updates,
        grace_period=_grace_period(config, train.validation_steps, total_updates, stream),
        mixed_precision=before.get("mixed_precision"),  # versions before this one had fp32 where nothing was said
    )


def _runs(train: TrainConfig, space: Space, folder: RunFolder, stream: TextIO) -> dict[str, CheckedRun]:
    """Return the checked runs of trials that need latents of their own, by `cache_key`."""
    runs, variants = {}, {}
    for settings in _cache_variants(train, space):
        key, variant = cache_key(settings, buckets=train.aspect_buckets), dataclasses.replace(train, **settings)
        runs[key], variants[key] = check(checks.to_check(variant, space), folder), variant
    # Before any of them looks into the folder, which may hold the cache of one of them.
    if problem := checks.one_cache_problem(train, [run.buckets for run in runs.values()]):
        raise ConfigError([problem])
    for key, run in runs.items():
        chosen = choose_latents(run, stream, reused=True)
        shared = dataclasses.replace(chosen.config, base_config=variants[key].base_config)
        runs[key] = dataclasses.replace(chosen, config=shared)
    return runs


def _shared_settings(train: TrainConfig, folder: RunFolder, before: Mapping[str, Any]) -> TrainConfig:
    """Complete `train`: the sweep's seed, its name as the trackers' group, one worker instead of 0."""
    seed = before.get("seed", secrets.randbelow(2**31)) if train.seed is None else train.seed
    return dataclasses.replace(
        train,
        num_workers="1" if train.in_this_process else train.num_workers,  # a trial has a process of its own in any case
        seed=seed,
        tracker_group=folder.name if train.tracker_group is None else train.tracker_group,
    )


def _with_absolute_paths(name: str, dimension: Dimension) -> Dimension:
    """Return the values of a setting with absolute paths, as trials run in other directories."""
    if not dimension.is_range:
        return dataclasses.replace(dimension, values=tuple(absolute(name, value) for value in dimension.values))
    return dimension


def _cache_variants(train: TrainConfig, space: Space) -> Iterator[dict[str, Any]]:
    """Return all combinations of the values that need their own latents; a single empty one if there are none."""
    names = cache_settings(space, buckets=train.aspect_buckets)
    for name in names:
        if space[name].is_range:
            raise ConfigError([f"--space: {name}: needs its own latents for every value; use choice or grid"])
    return combinations(space, names)


def _totals(run: CheckedRun, space: Space) -> Iterator[int]:
    """Yield numbers of updates that trials may do, the smallest and the largest among them."""
    for settings in combinations(space, names_that_decide("length")):
        tried = dataclasses.replace(run, config=dataclasses.replace(run.config, **settings))
        yield tried.schedule(None).total_updates


def _grace_period(config: SweepSettings, every: int, total_updates: int, stream: TextIO) -> int | None:
    """Return the grace period, a quarter of the run by default, rounded up to a validation: it is where trials stop."""
    if config.scheduler == "none":
        return None
    wanted = config.grace_period or -(-total_updates // 4)
    grace_period = -(-wanted // every) * every
    if grace_period >= total_updates:
        stream.write(
            f"sweep: no trial can be stopped early: the first validation from update {wanted} on "
            f"comes at the end, {total_updates}; lower --validation_steps or --grace_period\n"
        )
    return grace_period


def share(plan: SweepPlan, slots: TrialSlots, lease: SweepLease, resources: WorkerResources, stream: TextIO) -> Shared:
    """Return what the trials share; missing latents are made now, with the `resources` that a run would have.

    Raises:
        UserError, RunError: as `prepare`.
    """
    runs = {}
    for key, run in plan.runs.items():
        complete = ensure_latents(run, resources, stream)
        config = dataclasses.replace(
            complete.config, cpus_per_worker=slots.cpus_per_worker, push_to_hub=False, resume_from_checkpoint=None
        )
        runs[key] = dataclasses.replace(complete, config=config)
    precision = _precision(plan, slots, resources, stream)
    return Shared(lease.for_trials(), runs, slots, plan.config.trial_retries, precision)


def _precision(plan: SweepPlan, slots: TrialSlots, resources: WorkerResources, stream: TextIO) -> str | None:
    """Return the precision of trials that name none, and say which it is."""
    if "mixed_precision" in plan.space and None not in plan.space["mixed_precision"].values:
        return plan.mixed_precision
    asked = partial(workers_have_bf16, resources, plan.train.wait_timeout_s, stream)
    given, by = plan.train.mixed_precision, "the sweep has begun"
    before = plan.mixed_precision or "no" if plan.records else None
    precision, reason = resolve(given, before, use_gpu=slots.use_gpu, has_bf16=asked, by=by)
    if precision and reason:
        stream.write(f"sweep: trials train in {in_words(precision, reason)}\n")
    return precision
