"""All settings of a training run together, and what is declared of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raycontrolnet.config.cluster_settings import ClusterConfig
from raycontrolnet.config.declare import Facts, facts_of
from raycontrolnet.config.objective_settings import ObjectiveConfig
from raycontrolnet.config.optimizer_settings import AveragesConfig, OptimizerConfig
from raycontrolnet.config.output_settings import (
    HELD_OUT_ROWS,
    ROWS_TO_SPARE,
    HubConfig,
    OutputConfig,
    ValidationConfig,
)
from raycontrolnet.config.rules import Problems, problem_of
from raycontrolnet.config.settings import CacheConfig, DataConfig, ModelConfig, OptimConfig, StepConfig
from raycontrolnet.config.values import check_settings, coerce, misfit


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    ClusterConfig,
    HubConfig,
    ValidationConfig,
    OutputConfig,
    StepConfig,
    ObjectiveConfig,
    AveragesConfig,
    OptimizerConfig,
    OptimConfig,
    CacheConfig,
    DataConfig,
    ModelConfig,
):
    """All settings of one training run.

    Raises:
        ConfigError: with every problem at once, each naming the flag, the value and the fix.
    """

    def __post_init__(self) -> None:
        check_settings(self)

    def without_effect(self) -> Problems:
        """Yield a warning for each parameter that was given and does nothing beside the other settings."""
        for name, needed, value in PARAMETERS:
            if getattr(self, name) != getattr(TrainConfig, name) and getattr(self, needed) != value:
                yield problem_of(self, name, no_effect_without(needed, value))

    def num_held_out(self, num_rows: int) -> int:
        """Return the number of rows to hold out: 0, or at least 2, because control images are shuffled."""
        split = self.validation_split
        if split is None:
            return HELD_OUT_ROWS if num_rows >= ROWS_TO_SPARE else 0
        num_used = min(num_rows, self.max_train_samples or num_rows)
        return max(2, round(split * num_used)) if 0 < split < 1 else int(split)

    def num_used(self, num_rows: int) -> int:
        """Return the number of rows to train on and to hold out, which is larger than `num_rows` if all are used."""
        return (self.max_train_samples or num_rows) + self.num_held_out(num_rows)


def no_effect_without(needed: str, value: Any) -> str:
    """Return the warning about a parameter that needs the setting `needed` to have `value`."""
    return f"has no effect without --{needed}" + ("" if value is True else f" {value}")


PARAMETERS = (
    ("huber_delta", "loss", "huber"),
    ("logit_mean", "timestep_sampling", "logit_normal"),
    ("logit_std", "timestep_sampling", "logit_normal"),
    ("high_noise_power", "timestep_sampling", "high_noise"),
    ("ema_decay", "use_ema", True),
    ("lr_num_cycles", "lr_scheduler", "cosine_with_restarts"),
    ("lr_power", "lr_scheduler", "polynomial"),
)
"""Parameter, and the setting with the value that it belongs to."""
GROUPS: tuple[Any, ...] = TrainConfig.__bases__[::-1]
FACTS: dict[str, Facts] = facts_of(TrainConfig)
"""Facts about every setting, by its name."""


def names_with(fact: str) -> tuple[str, ...]:
    """Return the names of the settings that declare `fact`, one of the keys of `Facts`."""
    assert fact in Facts.__annotations__, fact
    return tuple(name for name, facts in FACTS.items() if fact in facts)


def names_that_decide(what: str) -> tuple[str, ...]:
    """Return the names of the settings whose values decide `what`, as `Facts` has it."""
    return tuple(name for name, facts in FACTS.items() if facts.get("decides") == what)


def typed_settings(given: Mapping[Any, Any], kinds: Mapping[str, Any], place: str) -> tuple[dict[str, Any], list[str]]:
    """Return those settings of the file `place` that `kinds` names, as their types, and a problem for each misfit."""
    settings, problems = {}, []
    for name in [name for name in given if name in kinds]:
        try:
            settings[name] = coerce(given[name], kinds[name])
        except ValueError as error:
            shown = "" if "secret" in FACTS.get(name, {}) else f"{given[name]!r} "
            problems.append(f"{place}: {name}{misfit(error, f': {shown}')}")
    return settings, problems


def public_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings as plain values without secrets, for config.yaml, manifests, trackers and the model card."""
    values = {name: getattr(config, name) for name, facts in FACTS.items() if "secret" not in facts}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def changed_settings(config: TrainConfig) -> dict[str, Any]:
    """Return those of `public_settings` that differ from their defaults."""
    defaults = {setting.name: setting.default for setting in dataclasses.fields(config)}
    return {name: value for name, value in public_settings(config).items() if getattr(config, name) != defaults[name]}
