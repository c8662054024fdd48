"""The settings of a sweep, besides those that its trials share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from raycontrolnet.config.data_sources import COLUMNS, SourceConfig
from raycontrolnet.config.optimizer_settings import OPTIMIZER_SETTINGS
from raycontrolnet.config.rules import Problems, at_least, one_of, problem_of
from raycontrolnet.config.space import Dimension, Space, combinations, place_of, read_space, shown
from raycontrolnet.config.sweepable import cache_problems, refusal, run_problems, without_keys
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.config.values import coerce_settings, setting_types
from raycontrolnet.errors import ConfigError

SCHEDULERS = ("asha", "median", "none")
SEARCHERS = ("random", "optuna")
OBJECTIVES = {
    "val_loss": "min",
    "loss": "min",
    "control_gap": "max",
    "control_fidelity": "max",
    "images_per_second": "max",
}
"""Metrics that trials can be ranked by -> the best value, smallest or largest."""
TOGETHER = (
    OPTIMIZER_SETTINGS,
    (*SourceConfig.FLAGS, "dataset_config_name", *COLUMNS),
    ("compile", "enable_xformers_memory_efficient_attention"),
)
"""Settings of which one decides what another may be: in a space, all their combinations are checked."""
MOST_COMBINATIONS = 5000
"""Combinations that are checked, in about a second."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Sweep: which settings its trials try, and how."""

    space: str | None = None
    """YAML file of the settings to try; by default learning_rate, lr_scheduler and proportion_empty_prompts."""
    num_samples: int = 16
    """Number of trials, each with settings drawn from the space; if it has grids, of each of their combinations."""
    max_concurrent_trials: int | None = None
    """Trials that run at a time; by default as many as fit in the cluster."""
    scheduler: str = "asha"
    """Way to stop weak trials early: asha, median (stops those below the median of the others) or none."""
    searcher: str = "random"
    """Search method: random, or optuna: pip install 'raycontrolnet[optuna]'."""
    objective: str = "val_loss"
    """Metric that ranks trials: val_loss, loss, control_gap, control_fidelity or images_per_second."""
    grace_period: int | None = None
    """Updates before a trial may be stopped, enough for control to appear; by default a quarter of the run."""
    reduction_factor: int = 4
    """asha continues one trial in this many, at grace_period and again at each multiple of it by this factor."""
    gpus_per_trial: float = 1.0
    """GPUs for a trial with one worker, if there are any; at 0.5, two trials share one."""
    trial_retries: int = 0
    """Number of times a failed trial (diverged, out of memory) is tried again from its last checkpoint."""
    allow_new_caches: bool = False
    """Let the space name settings whose values need their own latents, such as resolution."""
    resume: bool = False
    """Resume the sweep in output_dir; num_samples may be larger than before."""

    def problems(self) -> Problems:
        yield from at_least(self, 1, "num_samples", "max_concurrent_trials", "grace_period")
        yield from at_least(self, 2, "reduction_factor")
        yield from at_least(self, 0, "trial_retries")
        yield from one_of(self, "scheduler", SCHEDULERS)
        yield from one_of(self, "searcher", SEARCHERS)
        yield from one_of(self, "objective", tuple(OBJECTIVES))
        if not 0 < self.gpus_per_trial <= 1:
            yield problem_of(
                self, "gpus_per_trial", "must be above 0 and at most 1; for several GPUs use --num_workers"
            )


@dataclass(frozen=True, kw_only=True)
class SweepConfig(SweepSettings):
    """All settings of a sweep: its own, and those that its trials share.

    Raises:
        ConfigError: with every problem at once, each naming the flag, the value and the fix.
    """

    train: TrainConfig
    space: Mapping[str, Any] | str | Path | None = None  # type: ignore[assignment]
    """The settings to try: a YAML file, read at once, or its content; by default `DEFAULT_SPACE`."""

    def __post_init__(self) -> None:
        kinds = {name: kind for name, kind in setting_types(SweepSettings).items() if name != "space"}
        problems = coerce_settings(self, kinds) or list(self.problems())
        try:
            problems += [
                f"{place_of(self.space)}: {name}: {problem}"
                for name, dimension in self.parsed_space.items()
                for problem in self._problems_of(name, dimension)
            ]
            problems += self._problems_together()
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(problems)

    @cached_property
    def parsed_space(self) -> Space:
        return read_space(self.space)

    def _problems_of(self, name: str, dimension: Dimension) -> Problems:
        """Yield the problems of trying the setting `name`. Each value, or end of a range, is tried in a config."""
        if refused := refusal(name, self.objective):
            yield refused
            return
        yield from cache_problems(name, self.train, allow_new_caches=self.allow_new_caches)
        if self.searcher == "optuna" and dimension.kind == "grid":
            instead = f"use {{choice: {shown(dimension.values)}}}, or --searcher random"
            yield f"grid: optuna chooses values by itself and cannot go through a grid; {instead}"
        if name in self._together():
            return
        refusals = [problem for value in dimension.values for problem in run_problems(name, value, self.train)]
        yield from refusals
        if not refusals and dimension.whole:  # `resolution` has gaps
            for problem in run_problems(name, dimension.values[0] + 1, self.train):
                yield f"{dimension.kind}: {problem}; list the values with {{choice: [...]}}"

    def _together(self) -> dict[str, list[str]]:
        """Return name -> the settings of the space that its values are checked together with, itself among them."""
        groups = [[name for name in group if name in self.parsed_space] for group in TOGETHER]
        return {name: group for group in groups if len(group) > 1 for name in group}

    def _problems_together(self) -> Problems:
        """Yield the problems of combinations of values, each problem once, with the first combination that has it."""
        said = set[str]()
        for group in dict.fromkeys(map(tuple, self._together().values())):
            # A trial checks those that are beyond.
            for settings in islice(combinations(self.parsed_space, group), MOST_COMBINATIONS):
                try:
                    dataclasses.replace(self.train, **settings)
                except ConfigError as error:
                    new = [problem for problem in error.problems if problem not in said]
                    said.update(new)
                    together = ", ".join(f"{name} {shown(without_keys(value))}" for name, value in settings.items())
                    yield from (f"{place_of(self.space)}: {together}: {problem}" for problem in new)
