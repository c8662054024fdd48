"""The trial of a sweep that needs most memory: counted before any trial starts, and refused if it cannot fit.

Trials of a random search are known before they run. Optuna proposes them one after the other: of what it may propose,
the heaviest combination is counted, and only warned of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TextIO

from raycontrolnet.config.space import Space, combinations, draws, place_of, shown
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.errors import ConfigError
from raycontrolnet.launch.checked_run import CheckedRun
from raycontrolnet.launch.needs_beside import CannotFit, PendingNeeds
from raycontrolnet.model.optimizers import state_bytes_per_weight
from raycontrolnet.model.size import FP32_BYTES
from raycontrolnet.tune import checks
from raycontrolnet.tune.plan import SweepPlan

BATCH = "train_batch_size"
MEMORY_SETTINGS = (
    BATCH, "resolution", "gradient_checkpointing", "use_8bit_adam", "optimizer", "optimizer_args",
    "use_ema", "mixed_precision",
)  # fmt: skip
"""Settings by which trials need more memory or less."""
CHECKPOINTED = 0.35
"""Activations of a sample with gradient checkpointing, as a part of those without: 0.25 of 0.72 GiB in SD 1.5."""
OTHER_MODELS = {"pretrained_model_name_or_path", "controlnet_model_name_or_path", "base_config", "revision", "variant"}
"""Settings by which trials may have other models than the one that is counted."""


class Heaviest(NamedTuple):
    """The trial that may need most memory."""

    run: CheckedRun
    settings: Mapping[str, Any]
    """The settings in the space by which it needs more or less."""
    trial: int | None
    """Its index; None if nobody knows that a new trial will have these settings."""


def heaviest(plan: SweepPlan) -> Heaviest:
    """Return the trial that seems to need most memory, by its batch, its images and what it saves."""
    trials: dict[tuple[tuple[str, Any], ...], int | None] = {}
    for index, settings in _trials(plan):
        trials.setdefault(tuple(settings.items()), index)
    largest = max(trials, key=lambda settings: _weight(dataclasses.replace(plan.train, **dict(settings))))
    begun = plan.mixed_precision or ("no" if plan.records else None)
    of_one_size = {"resolution", "aspect_buckets"}.isdisjoint(plan.space)  # else a square bounds what they need
    run = dataclasses.replace(
        plan.run,
        config=checks.settings_of_trial(plan.train, dict(largest), begun),
        buckets=plan.run.buckets if of_one_size else None,
    )
    return Heaviest(run, dict(largest), trials[largest])


def _trials(plan: SweepPlan) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Yield index and memory settings of the new trials that are known; without an index, of those that may be tried.

    Also without, of those that an earlier part of the sweep began: one that cannot fit must not keep the others.
    """
    known: list[tuple[int | None, Mapping[str, Any]]] = [
        (None, record.settings) for record in plan.records if not record.ended
    ]
    new = set(plan.new_indices)
    if plan.config.searcher == "random" and new:
        assert plan.train.seed is not None
        drawn = enumerate(draws(plan.space, plan.train.seed, max(new) + 1))
        known += [(index, settings) for index, settings in drawn if index in new]
    for index, settings in known:
        yield index, {name: settings[name] for name in MEMORY_SETTINGS if name in settings}
    if plan.config.searcher != "random":
        yield from ((None, settings) for settings in combinations(plan.space, MEMORY_SETTINGS))


def _weight(config: TrainConfig) -> tuple[float, ...]:
    """Return what grows with a trial's memory, as far as it can be told without a count."""
    activations = (
        config.train_batch_size * config.resolution**2 * (CHECKPOINTED if config.gradient_checkpointing else 1)
    )
    activations *= 2 if config.mixed_precision == "no" else 1
    return activations, state_bytes_per_weight(config) + FP32_BYTES * config.use_ema


def say_heaviest(plan: SweepPlan, found: Heaviest, needs: PendingNeeds, stream: TextIO, **how: Any) -> None:
    """Say what the heaviest trial needs; if it cannot fit and may never be tried, say which trials cannot.

    Args:
        how: as of `PendingNeeds.say`.

    Raises:
        ConfigError: it cannot fit, and it will be tried, or no other trial can fit either.
    """
    try:
        needs.say(found.run.schedule(None), stream=stream, **how)
    except CannotFit as error:
        if not found.settings:
            raise
        place, size = place_of(plan.config.space), found.run.config.train_batch_size
        why = str(error).removeprefix(f"--train_batch_size={size}: ")
        if others := sorted(OTHER_MODELS & plan.space.keys()):
            stream.write(f"warning: {why}; trials with another {others[0]} may need more or less, and fail alone\n")
            return
        instead = f"a changed space needs another --output_dir, or {plan.folder.shown} removed"
        if found.trial is not None:
            own = in_words(found.settings)
            raise ConfigError([f"{place}: trial {found.trial} has {own}, and cannot fit: {why}; {instead}"]) from None
        smallest = _smallest(plan.space, size, error.may_fit)
        if found.settings.keys() == {BATCH} and smallest == min(plan.space[BATCH].values):
            raise ConfigError([f"{place}: no trial can fit: {why}; {instead}"]) from None
        own = in_words({**found.settings, BATCH: smallest} if BATCH in found.settings else found.settings)
        more = " or more" if smallest < size else ""
        stream.write(f"warning: trials with {own}{more} cannot fit, and fail alone: {why}\n")


def in_words(settings: Mapping[str, Any]) -> str:
    """Return settings and their values, the batch last."""
    names = sorted(settings, key=lambda name: name == BATCH)
    return ", ".join(f"{name} {shown(settings[name])}" for name in names)


def _smallest(space: Space, size: int, may_fit: Callable[[int], bool]) -> int:
    """Return the smallest batch in the space that cannot fit with the rest of the heaviest trial's settings."""
    if BATCH not in space:
        return size
    values = space[BATCH].values
    tried = range(values[0], values[1] + 1) if space[BATCH].is_range else sorted(values)
    return next((each for each in tried if not may_fit(each)), size)
