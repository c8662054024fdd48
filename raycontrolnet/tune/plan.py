"""What a sweep will do, checked and decided before Ray starts; and with Ray, what its trials share."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from raycontrolnet.cluster.resources import WorkerResources
from raycontrolnet.config.checks import versions, with_absolute_paths
from raycontrolnet.config.space import Choice, Space, num_trials, to_grammar
from raycontrolnet.config.sweep_config import OBJECTIVES, SweepConfig
from raycontrolnet.config.sweepable import cache_settings
from raycontrolnet.config.train_config import TrainConfig, public_settings
from raycontrolnet.errors import ConfigError
from raycontrolnet.latents.ensure import WantedLatents, on_ray, planned_latents, with_latents
from raycontrolnet.launch.preflight import CheckedRun, check
from raycontrolnet.tune.checks import MODELS, _differences, _objective_problem, _problems, _variants, _warnings, _with
from raycontrolnet.tune.concurrency import TrialSlots
from raycontrolnet.tune.recorder import mark_interrupted
from raycontrolnet.tune.records import SweepLease, TrialRecord, read_records, read_sweep
from raycontrolnet.tune.trial import Shared, cache_key

LENGTHS = ("max_train_steps", "num_train_epochs", "train_batch_size", "gradient_accumulation_steps")
"""Settings that decide how many updates a trial does."""


@dataclass(frozen=True)
class SweepPlan:
    """A sweep whose input has been checked."""

    config: SweepConfig
    """As given."""
    sweep_dir: Path
    space: Space
    num_trials: int
    runs: Mapping[str, tuple[CheckedRun, WantedLatents | None]]
    """The sweep's run for each latent cache (see `cache_key`): trials differ from it by the settings they try."""
    records: Sequence[TrialRecord]
    """Trials of an earlier part of the sweep."""
    total_updates: int
    grace_period: int | None
    """Updates before a trial may be stopped; None if none is."""

    @property
    def run(self) -> CheckedRun:
        """That of the first cache."""
        return next(iter(self.runs.values()))[0]

    @property
    def train(self) -> TrainConfig:
        """The settings that trials share, with absolute paths and a seed; those that the space names differ."""
        return self.run.config

    @property
    def mode(self) -> str:
        return OBJECTIVES[self.config.objective]

    @property
    def num_left(self) -> int:
        """Trials that are still to be trained, or to go on."""
        return sum(not record.ended for record in self.records) + max(0, self.num_trials - len(self.records))

    def facts(self) -> dict[str, Any]:
        """For sweep.json."""
        config = self.config
        names = ("searcher", "scheduler", "objective", "num_samples", "reduction_factor")
        return {
            "name": self.sweep_dir.name,
            **{name: getattr(config, name) for name in names},
            "mode": self.mode,
            "space": to_grammar(self.space),
            "seed": self.train.seed,
            "num_trials": self.num_trials,
            "total_updates": self.total_updates,
            "validation_steps": self.train.validation_steps,
            "grace_period": self.grace_period,
            "settings": public_settings(self.train),
            "versions": versions(),
        }

    def device_settings(self) -> Iterator[TrainConfig]:
        """The settings with each value of the space that asks something of the device."""
        yield self.train
        for name in set(self.space) & {"mixed_precision", "enable_xformers_memory_efficient_attention"}:
            for value in self.space[name].values:
                yield _with(self.train, {name: value})

    def config_of(self, record: TrialRecord) -> TrainConfig:
        """The settings of a trial, as `fit` takes them for the same run."""
        return _with(self.train, record.settings)


def plan_sweep(config: SweepConfig, stream: TextIO) -> SweepPlan:
    """Check everything that can be checked before Ray starts and models are read.

    Raises:
        ConfigError: with what is wrong.
    """
    sweep_dir = Path(config.train.output_dir).expanduser().resolve()
    before, space = read_sweep(sweep_dir), config.parsed_space
    if before and not config.resume:
        raise ConfigError(
            [f"--output_dir={sweep_dir}: holds a sweep; go on with it by --resume, or name another folder"]
        )
    if config.resume and not before:
        stream.write(f"sweep: there is nothing to go on with in {sweep_dir}: a new sweep begins\n")
    train = _shared_settings(config.train, sweep_dir, before)
    space = _with_absolute_paths(space, train, sweep_dir)
    problems = [*_differences(before, config, train, space), *_problems(config, train, space)]
    if problems:
        raise ConfigError(problems)
    runs = {}
    for settings in _cache_variants(space):
        run = check(_with(train, settings), sweep_dir)
        runs[cache_key(settings)] = run, planned_latents(run, stream, reused=True)
    checked = [run for run, _ in runs.values()]
    for run in checked:
        if problem := _objective_problem(config.objective, run):
            raise ConfigError([problem])
    total_updates = max(total for run in checked for total in _totals(run, space))
    stream.writelines(f"sweep: {warning}\n" for warning in dict.fromkeys(_warnings(train, space, total_updates)))
    return SweepPlan(
        config=config,
        sweep_dir=sweep_dir,
        space=space,
        num_trials=num_trials(space, config.num_samples),
        runs=runs,
        records=[mark_interrupted(sweep_dir, record) for record in read_records(sweep_dir)] if before else [],
        total_updates=total_updates,
        grace_period=_grace_period(config, train.validation_steps, total_updates, stream),
    )


def _shared_settings(train: TrainConfig, sweep_dir: Path, before: Mapping[str, Any]) -> TrainConfig:
    """`train`, complete: absolute paths, the sweep's seed, its name as the trackers' group, one worker instead of 0."""
    train = with_absolute_paths(train, sweep_dir)
    in_callers_process = train.worker_range == (0, 0)  # a trial's one worker is its own process anyway
    seed = before.get("seed", secrets.randbelow(2**31)) if train.seed is None else train.seed
    return dataclasses.replace(
        train,
        num_workers="1" if in_callers_process else train.num_workers,
        seed=seed,
        tracker_group=sweep_dir.name if train.tracker_group is None else train.tracker_group,
    )


def _with_absolute_paths(space: Space, train: TrainConfig, sweep_dir: Path) -> Space:
    """Models and data in the space as trials, which run elsewhere, must see them."""
    found = dict(space)
    for name in {*MODELS, "train_data_dir", "dataset_name"} & set(space):
        dimension = space[name]
        if isinstance(dimension, Choice):
            configs = [with_absolute_paths(_with(train, {name: value}), sweep_dir) for value in dimension.values]
            found[name] = dataclasses.replace(dimension, values=tuple(getattr(config, name) for config in configs))
    return found


def _cache_variants(space: Space) -> Iterator[dict[str, Any]]:
    """The settings of the space that need latents of their own, in all combinations; at least one, empty."""
    values = {}
    for name in cache_settings(space):
        dimension = space[name]
        if not isinstance(dimension, Choice):
            raise ConfigError([f"--space: {name}: needs latents of its own for every value; use choice or grid"])
        values[name] = dimension.values
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def _totals(run: CheckedRun, space: Space) -> Iterator[int]:
    """Updates of a trial: the ends of what they may come to."""
    for config in _variants(run.config, space, LENGTHS):
        yield dataclasses.replace(run, config=config).plan(run.config.worker_range[1], None).total_updates


def _grace_period(config: SweepConfig, every: int, total_updates: int, stream: TextIO) -> int | None:
    """A quarter of the run by default, up to the next validation: only there is a trial judged."""
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


def shared_of(
    plan: SweepPlan, places: TrialSlots, marker: SweepLease, resources: WorkerResources, stream: TextIO
) -> Shared:
    """What the trials share; its latents are made now, if need be, with the `resources` that a run would have.

    Raises:
        UserError, RunError: as `prepare`.
    """
    runs = {}
    for key, (run, latents) in plan.runs.items():
        complete = with_latents(run, latents, on_ray(resources), stream, shared=not resources.one_machine)
        own = {"cpus_per_worker": places.cpus_per_worker, "push_to_hub": False, "resume_from_checkpoint": None}
        config = _with(complete.config, own)
        runs[key] = dataclasses.replace(complete, config=config)
    return Shared(
        sweep_dir=plan.sweep_dir,
        marker=marker,
        runs=runs,
        in_process=places.in_process,
        use_gpu=places.use_gpu,
        threads=None if places.use_gpu else places.threads,
        retries=plan.config.trial_retries,
    )
