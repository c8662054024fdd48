"""Checks of a sweep before its first trial."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from raycontrolnet.cluster.session import on_a_cluster
from raycontrolnet.config.checks import collected, find_token, package_problem
from raycontrolnet.config.objective_settings import ZERO_SNR
from raycontrolnet.config.optimizer_settings import OPTIMIZER_SETTINGS
from raycontrolnet.config.rules import problem_of
from raycontrolnet.config.space import Space, combinations, num_combinations, num_trials, place_of, to_grammar
from raycontrolnet.config.sweep_config import SweepConfig
from raycontrolnet.config.train_config import (
    PARAMETERS,
    TrainConfig,
    names_that_decide,
    names_with,
    no_effect_without,
)
from raycontrolnet.data.buckets import Buckets
from raycontrolnet.launch.checked_run import CheckedRun
from raycontrolnet.model.base_family import (
    OBJECTIVE_SETTINGS,
    SIZE_SETTINGS,
    base_family,
    objective_problems,
    size_problems,
)
from raycontrolnet.model.loading import BASE
from raycontrolnet.model.optimizers import try_optimizer
from raycontrolnet.model.paths import model_path_problem
from raycontrolnet.model.problems import model_problems
from raycontrolnet.model.single_file import is_single_file
from raycontrolnet.storage.uri import shown_value
from raycontrolnet.text import counted
from raycontrolnet.training.schedule import warmup_warning


def warnings(config: SweepConfig, train: TrainConfig, space: Space, total_updates: int) -> Iterator[str]:
    """Yield warnings about the trials of a sweep.

    Args:
        config: as given.
        train: the settings that trials share.
        space: the settings to try.
        total_updates: of a trial.
    """
    objective = config.objective
    yield from _without_effect(train, space)
    yield from _repeated(config, space)
    if ZERO_SNR in space and objective in ("val_loss", "control_gap"):
        yield (
            f"trials with and without --{ZERO_SNR} are measured at other noise levels, so their {objective} differs "
            "for that alone; compare them by --objective control_fidelity"
        )
    for name in ("aspect_buckets", "crop"):
        if name in space and objective in ("val_loss", "control_gap"):
            yield (
                f"trials of another --{name} are measured on other parts of the held-out images, so their {objective} "
                "differs for that alone; compare them by --objective control_fidelity"
            )
    if (every := train.checkpointing_steps) >= total_updates:
        yield (
            f"trials write a checkpoint only at their end (--checkpointing_steps={every}, {total_updates} updates): "
            "a trial that is interrupted starts again from the beginning"
        )
    for settings in combinations(space, names_that_decide("warm-up")):
        if warning := warmup_warning(dataclasses.replace(train, **settings), total_updates):
            yield warning


def _without_effect(train: TrainConfig, space: Space) -> Iterator[str]:
    """Yield parameters of the space, and those that trials share, that have no effect in any trial."""
    for name, needed, value in PARAMETERS:
        if value in values_of(needed, train, space):
            continue
        if name in space:
            problem = no_effect_without(needed, value)
            yield f"--space: {name}: {problem}; trials that differ by it alone are the same"
        elif getattr(train, name) != getattr(TrainConfig, name):
            yield problem_of(train, name, no_effect_without(needed, value))


def _repeated(config: SweepConfig, space: Space) -> Iterator[str]:
    """Yield a warning if there are fewer combinations of values than trials."""
    trials, different = num_trials(space, config.num_samples), num_combinations(space)
    if different is not None and trials > different:
        yield (
            f"--num_samples={config.num_samples}: there are {trials:,} trials, and {counted(different, 'combination')} "
            "of values in the space: some trials have the same settings, and train the same; lower it to "
            f"{different * config.num_samples // trials}"
        )


def problems(config: SweepConfig, space: Space) -> Iterator[str]:
    """Yield missing packages and models, and settings that make no sense in a sweep."""
    if config.searcher == "optuna" and importlib.util.find_spec("optuna") is None:
        yield "--searcher=optuna: optuna is not installed; run pip install 'raycontrolnet[optuna]'"
    yield from _value_problems(space, place_of(config.space))
    train = config.train
    steps = values_of("max_train_steps", train, space)
    if "num_train_epochs" in space and None not in steps:
        given = "" if "max_train_steps" in space else f"={steps[0]}"
        problem = f"has no effect with --max_train_steps{given}; leave one of them out"
        yield f"--space: num_train_epochs: {problem}"
    if train.resume_from_checkpoint is not None:
        instead = "--resume resumes a sweep, --controlnet_model_name_or_path names weights to start from"
        yield f"--resume_from_checkpoint={train.resume_from_checkpoint}: is for single runs; {instead}"


def differences(
    before: Mapping[str, Any], config: SweepConfig, settings: Mapping[str, Any], space: Space
) -> Iterator[str]:
    """Yield what must not differ from the sweep that is to be resumed, but does.

    Args:
        before: the content of its sweep.json.
        config: as given now.
        settings: the public settings that trials share now.
        space: the settings to try now.
    """
    if not before:
        return
    advice = "a sweep is resumed with the same settings; leave the flag as it was, or name another --output_dir"
    for name, then, now in (
        ("space", before["space"], to_grammar(space)),
        ("searcher", before["searcher"], config.searcher),
    ):
        if then != now:
            yield f"--{name}: was {shown_value(then)} and is {shown_value(now)}; {advice}"
    if (trials := num_trials(space, config.num_samples)) < before["num_trials"]:
        yield (
            f"--num_samples={config.num_samples}: makes {trials} trials, and the sweep has {before['num_trials']}; "
            "the number can only grow"
        )
    free = {*names_with("changes_on_resume"), *space}
    for name, now in settings.items():
        then = before["settings"].get(name, now)
        if name not in free and now != then:
            yield f"--{name}={shown_value(now)}: was {shown_value(then)}; {advice}"


def _value_problems(space: Space, place: str) -> Iterator[str]:
    """Yield values of the space that need a package or a model that is not there; see `place_of`."""
    for name, dimension in space.items():
        for value in dimension.values:
            if problem := package_problem(name, value) or model_path_problem(name, value):
                yield f"{place}: {name}: {problem.removeprefix(f'--{name}').lstrip('=: ')}"


def values_of(name: str, train: TrainConfig, space: Space) -> tuple[Any, ...]:
    """Return the values that trials may have of a setting; of a range, its ends."""
    return space[name].values if name in space else (getattr(train, name),)


def model_problems_of(train: TrainConfig, space: Space) -> list[str]:
    """Return what is wrong with the models that trials use beside those of `train`."""
    token, elsewhere = find_token(train.hub_token), on_a_cluster(train.address)
    return _problems_of_variants(
        train,
        space,
        (*names_with("model_folders"), "revision", "variant"),
        lambda variant: model_problems(variant, token, elsewhere=elsewhere),
    )


def optimizer_problems_of(train: TrainConfig, space: Space) -> list[str]:
    """Return what is wrong with the optimizers of trials: with each class all arguments, as trials may draw them."""
    found: list[str] = []
    for settings in combinations(space, OPTIMIZER_SETTINGS):
        together = [f"{name} {value}" for name, value in settings.items()]
        problems: list[str] = []
        with collected(problems):
            try_optimizer(dataclasses.replace(train, **settings))
        found += [f"--space: {', '.join(together)}: {problem}" if together else problem for problem in problems]
    return list(dict.fromkeys(found))


def size_problems_of(train: TrainConfig, space: Space) -> list[str]:
    """Return what is wrong with the size conditions of trials, with each of their base models."""
    if not any(name in space for name in SIZE_SETTINGS):
        return []
    token = find_token(train.hub_token)
    return _problems_of_variants(
        train,
        space,
        (BASE, *SIZE_SETTINGS),
        lambda variant: size_problems(variant, base_family(variant, token)),
    )


def objective_problems_of(train: TrainConfig, space: Space) -> list[str]:
    """Return what is wrong with the training loss of trials, with each of their base models."""
    token = find_token(train.hub_token)
    return _problems_of_variants(
        train,
        space,
        (BASE, *OBJECTIVE_SETTINGS),
        lambda variant: objective_problems(variant, variant, base_family(variant, token), token),
    )


def for_its_base(variant: TrainConfig) -> TrainConfig:
    """Return the settings of a trial without `--base_config` if its base model is no single file."""
    if variant.base_config is None or is_single_file(variant.pretrained_model_name_or_path):
        return variant
    return dataclasses.replace(variant, base_config=None)


def settings_of_trial(train: TrainConfig, own: Mapping[str, Any], mixed_precision: str | None) -> TrainConfig:
    """Return the settings of a trial: those that trials share, with its `own`.

    Args:
        mixed_precision: precision of trials that name none.
    """
    config = for_its_base(dataclasses.replace(train, **own))
    return dataclasses.replace(config, mixed_precision=config.mixed_precision or mixed_precision)


def to_check(variant: TrainConfig, space: Space) -> TrainConfig:
    """Return the settings of a trial as they are checked: `--base_config` is for those trials with single files."""
    some_need_it = BASE in space and any(is_single_file(value) for value in space[BASE].values)
    return for_its_base(variant) if some_need_it else variant


def _problems_of_variants(
    train: TrainConfig, space: Space, names: Iterable[str], problems_of: Callable[[TrainConfig], Iterable[str]]
) -> list[str]:
    """Return the problems, each once, of `train` with all combinations of the space's values for `names`."""
    tried = (dataclasses.replace(train, **settings) for settings in combinations(space, names) if settings)
    variants = (to_check(variant, space) for variant in tried)
    return list(dict.fromkeys(problem for variant in variants for problem in problems_of(variant)))


def one_cache_problem(train: TrainConfig, buckets: Sequence[Buckets | None]) -> str | None:
    """Return why trials with these aspect buckets cannot have one folder of latents; None if they can, or need not."""
    sizes = {each.sizes for each in buckets if each}
    if len(sizes) < 2 or train.latents_cache_dir is None or train.cache_latents == "off":
        return None
    return (
        f"--latents_cache_dir={train.latents_cache_dir}: holds one cache, and the space's batch sizes need "
        f"{len(sizes)}, as buckets with fewer rows than a batch are merged; leave it out, so that each gets a folder"
    )


def objective_problem(objective: str, run: CheckedRun) -> str | None:
    """Return why the objective cannot be measured; None if it can."""
    num_rows = len(run.source)
    if objective in ("val_loss", "control_gap") and run.config.num_held_out(num_rows) < 2:
        return (
            f"--objective={objective}: is measured on held-out rows, and none of these {num_rows:,} rows are held out; "
            f"give --validation_split {max(2, min(16, num_rows // 8))}, or --objective loss"
        )
    if objective == "control_fidelity" and run.config.control_fidelity is None:
        return (
            "--objective=control_fidelity: is measured on validation images; give --control_fidelity, "
            "--validation_prompt and --validation_image"
        )
    return None
