"""Checks of which settings a sweep may try, and with which values. The settings say what they are in their `Facts`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from raycontrolnet.config.rules import holds_secret
from raycontrolnet.config.settings import CacheConfig
from raycontrolnet.config.train_config import FACTS, TrainConfig, names_that_decide
from raycontrolnet.errors import ConfigError

NOT_DECLARED = "is not declared as a setting that trials may try"


def cache_settings(names: Iterable[str], *, buckets: bool = False) -> list[str]:
    """Return those of `names` whose values each need a latent cache of their own, sorted.

    Args:
        names: of settings that trials try.
        buckets: whether trials that do not try it have aspect buckets: a bucket with fewer rows than a batch is merged.
    """
    names = set(names)
    decide = {*names_that_decide("latents"), *(["train_batch_size"] if buckets or "aspect_buckets" in names else [])}
    return sorted(decide & names)


def refusal(name: str, objective: str) -> str | None:
    """Return why the setting `name` cannot be swept, whatever its values; None if it can.

    Args:
        name: name of the setting.
        objective: metric that trials are ranked by.
    """
    facts = FACTS[name]
    if "sweepable" in facts:
        if objective != "loss" or facts.get("decides") != "training loss":
            return None
        reason = "decides what the training loss is, so that the loss of trials could not be compared"
        return f"cannot be swept: it {reason}; rank them by --objective val_loss or control_gap"
    reason = facts.get("fixed", NOT_DECLARED)
    if "decides_measurement" in facts:
        reason = f"decides {facts['decides_measurement']}, so that the {objective} of trials could not be compared"
    return f"cannot be swept: it {reason}; {facts.get('instead', f'set it for all trials with --{name}')}"


def takes_values(name: str) -> bool:
    """Return whether values of `name` in a space may be read; those of other settings may be secret."""
    return not {"sweepable", "decides_measurement"}.isdisjoint(FACTS[name])


def cache_problems(name: str, cache: CacheConfig, *, allow_new_caches: bool) -> list[str]:
    """Return what prevents a latent cache for each value of `name`, if the values need them."""
    if not cache_settings([name]) or cache.cache_latents == "off":
        return []
    if not allow_new_caches:
        why = "each value needs its own latent cache, which takes time and disk"
        return [f"{why}; add --allow_new_caches to make them"]
    if cache.latents_cache_dir is not None:
        why = f"each value needs its own latent cache, and --latents_cache_dir={cache.latents_cache_dir} holds only one"
        return [f"{why}; leave --latents_cache_dir out, so that each gets a folder"]
    return []


def without_keys(value: Any) -> Any:
    """Return a value for messages: `a URI` for one with a password or key in it."""
    if isinstance(value, tuple):
        return tuple(map(without_keys, value))
    return "a URI" if holds_secret(str(value)) else value


def run_problems(name: str, value: Any, train: TrainConfig) -> list[str]:
    """Return what is wrong with a run of `train` with another `value` of `name`; each line starts with the value."""
    try:
        dataclasses.replace(train, **{name: value})
    except ConfigError as error:
        flag = rf"--{name}(={re.escape(str(value))}|={re.escape(repr(value))})?: "
        shown = str(without_keys(value)) or repr(value)
        return [f"{shown}: {re.sub(f'^{flag}', '', problem)}" for problem in error.problems]
    return []
