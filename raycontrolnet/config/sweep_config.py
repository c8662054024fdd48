"""The settings of a sweep, beside those that its trials share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raycontrolnet.config.rules import Problems, at_least, one_of, problem_of
from raycontrolnet.config.space import Space, check_space, place_of, read_space
from raycontrolnet.config.train_config import TrainConfig, coerce_settings, setting_types
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
"""What trials can be ranked by -> which is better, the smallest or the largest."""


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """Sweep"""

    space: str | None = None
    """YAML file of the settings to try; by default learning_rate, lr_scheduler and proportion_empty_prompts."""
    num_samples: int = 16
    """Trials, each with settings drawn from the space; of every combination of its grids, if it has any."""
    max_concurrent_trials: int | None = None
    """Trials at a time; by default as many as the cluster has room for."""
    scheduler: str = "asha"
    """What stops weak trials early: asha, median (those below the median of the others) or none."""
    searcher: str = "random"
    """What proposes settings: random, or optuna: pip install 'raycontrolnet[optuna]'."""
    objective: str = "val_loss"
    """What trials are ranked by: val_loss, loss, control_gap, control_fidelity or images_per_second."""
    grace_period: int | None = None
    """Updates before a trial may be stopped: longer than control takes to appear; by default a quarter of the run."""
    reduction_factor: int = 4
    """asha lets the best of this many go on, at grace_period and at each multiple of it by this factor."""
    gpus_per_trial: float = 1.0
    """GPUs of a trial with one worker, where there are any; 0.5 lets two share one."""
    trial_retries: int = 0
    """How often a trial whose training failed (diverged, out of memory) is tried again from its last checkpoint."""
    allow_new_caches: bool = False
    """Let the space name settings that need latents of their own, such as resolution."""
    resume: bool = False
    """Go on with the sweep in output_dir; num_samples may have grown."""

    def problems(self) -> Problems:
        yield from at_least(self, 1, "num_samples", "max_concurrent_trials", "grace_period")
        yield from at_least(self, 2, "reduction_factor")
        yield from at_least(self, 0, "trial_retries")
        yield from one_of(self, "scheduler", SCHEDULERS)
        yield from one_of(self, "searcher", SEARCHERS)
        yield from one_of(self, "objective", tuple(OBJECTIVES))
        if not 0 < self.gpus_per_trial <= 1:
            yield problem_of(self, "gpus_per_trial", "must be above 0 and at most 1; several are for --num_workers")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(SweepSettings):
    """All settings of a sweep: its own, and those that its trials share.

    Raises:
        ConfigError: with every problem at once, each naming the flag, the value and the fix.
    """

    train: TrainConfig
    space: Mapping[str, Any] | str | Path | None = None  # type: ignore[assignment]
    """The settings to try: a YAML file, read here and now, or its content; by default those of `DEFAULT_SPACE`."""

    def __post_init__(self) -> None:
        kinds = {name: kind for name, kind in setting_types(SweepSettings).items() if name != "space"}
        problems = coerce_settings(self, kinds) or list(self.problems())
        try:
            space = self.parsed_space
        except ConfigError as error:
            problems += error.problems
        else:
            problems += check_space(
                space,
                self.train,
                place=place_of(self.space),
                searcher=self.searcher,
                objective=self.objective,
                allow_new_caches=self.allow_new_caches,
            )
        if problems:
            raise ConfigError(problems)

    @cached_property
    def parsed_space(self) -> Space:
        return read_space(self.space)
