"""Checks of a sweep before its first trial."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raycontrolnet.config.checks import local_model_problems, missing_extras
from raycontrolnet.config.space import Space, num_trials, place_of, to_grammar
from raycontrolnet.config.sweep_config import SweepConfig
from raycontrolnet.config.train_config import TrainConfig, public_settings
from raycontrolnet.launch.preflight import CheckedRun
from raycontrolnet.training.schedule import warmup_warning

MODELS = ("pretrained_model_name_or_path", "controlnet_model_name_or_path", "tokenizer_name")
WARMUP = ("lr_scheduler", "lr_warmup_steps")
ALL_THE_SAME = {"address", "cpus_per_worker", "hub_model_id", "max_failures", "output_dir", "push_to_hub", "use_gpu"}
"""Settings that may change when a sweep goes on."""


def _warnings(train: TrainConfig, space: Space, total_updates: int) -> Iterator[str]:
    """What users should know of trials of so many updates."""
    if (every := train.checkpointing_steps) >= total_updates:
        yield (
            f"trials write a checkpoint at their end only (--checkpointing_steps={every}, {total_updates} updates): "
            "one that is cut off begins anew"
        )
    for config in _variants(train, space, WARMUP):
        if warning := warmup_warning(config, total_updates):
            yield warning


def _problems(config: SweepConfig, train: TrainConfig, space: Space) -> Iterator[str]:
    """Packages and folders that are not there, and settings that make no sense in a sweep."""
    if config.searcher == "optuna" and importlib.util.find_spec("optuna") is None:
        yield "--searcher=optuna: optuna is not installed; run pip install 'raycontrolnet[optuna]'"
    yield from _value_problems(train, space, place_of(config.space))
    if "num_train_epochs" in space and train.max_train_steps is not None:
        problem = f"does nothing beside --max_train_steps={train.max_train_steps}; leave either out"
        yield f"--space: num_train_epochs: {problem}"
    if train.resume_from_checkpoint is not None:
        instead = "--resume goes on with a sweep, --controlnet_model_name_or_path names weights to start from"
        yield f"--resume_from_checkpoint={train.resume_from_checkpoint}: is for single runs; {instead}"


def _differences(before: Mapping[str, Any], config: SweepConfig, train: TrainConfig, space: Space) -> Iterator[str]:
    """What of the sweep that is to go on was otherwise."""
    if not before:
        return
    advice = "a sweep goes on with what it began; leave the flag as it was, or name another --output_dir"
    for name, then, now in (
        ("space", before["space"], to_grammar(space)),
        ("searcher", before["searcher"], config.searcher),
    ):
        if then != now:
            yield f"--{name}: was {then} and is {now}; {advice}"
    if (trials := num_trials(space, config.num_samples)) < before["num_trials"]:
        yield (
            f"--num_samples={config.num_samples}: makes {trials} trials, and the sweep has {before['num_trials']}; "
            "it can only get more"
        )
    settings = public_settings(train)
    for name, then in before["settings"].items():
        if name in settings and name not in ALL_THE_SAME and name not in space and settings[name] != then:
            yield f"--{name}={settings[name]}: was {then}; {advice}"


def _with(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    return dataclasses.replace(config, **changes)


def _value_problems(train: TrainConfig, space: Space, place: str) -> Iterator[str]:
    """Values of the space that need a package, or a folder, that is not there; see `place_of`."""
    for name in {*MODELS, "use_8bit_adam", "enable_xformers_memory_efficient_attention"} & set(space):
        for value in space[name].values:
            config = _with(train, {name: value})
            found = [*missing_extras(config), *local_model_problems(config)]
            own = (problem.removeprefix(f"--{name}") for problem in found if problem.startswith(f"--{name}"))
            yield from (f"{place}: {name}: {problem.lstrip('=: ')}" for problem in own)


def _variants(config: TrainConfig, space: Space, names: Sequence[str]) -> Iterator[TrainConfig]:
    """`config` with the values, or the ends of their ranges, that the space has for `names`, in all combinations."""
    tried = [name for name in names if name in space]
    for values in itertools.product(*(space[name].values for name in tried)):
        yield _with(config, dict(zip(tried, values, strict=True)))


def _objective_problem(objective: str, run: CheckedRun) -> str | None:
    """What keeps the objective from being measured."""
    num_rows = len(run.source)
    if objective in ("val_loss", "control_gap") and run.config.num_held_out(num_rows) < 2:
        return (
            f"--objective={objective}: is measured on held-out rows, and of these {num_rows:,} rows none are held out; "
            "give --validation_split 16, or --objective loss"
        )
    if objective == "control_fidelity" and run.config.control_fidelity is None:
        return (
            "--objective=control_fidelity: is measured on validation images; give --control_fidelity, "
            "--validation_prompt and --validation_image"
        )
    return None
