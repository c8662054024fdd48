"""A sweep's space: its grammar by every message, its checks, and draws that depend on nothing else."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from raycontrolnet.cli import parse
from raycontrolnet.config.declare import Facts
from raycontrolnet.config.settings import LR_SCHEDULERS
from raycontrolnet.config.space import (
    DEFAULT_SPACE,
    Dimension,
    draw,
    draws,
    num_combinations,
    num_trials,
    optuna_distributions,
    place_of,
    read_space,
    to_grammar,
)
from raycontrolnet.config.sweep_config import TOGETHER, SweepConfig
from raycontrolnet.config.sweepable import refusal
from raycontrolnet.config.train_config import FACTS, TrainConfig, names_that_decide, names_with
from raycontrolnet.config.values import coerce, setting_types
from raycontrolnet.errors import ConfigError

TYPES = setting_types(TrainConfig)
NEEDS_CACHE = frozenset(names_that_decide("latents"))
SWEEPABLE = frozenset(names_with("sweepable")) - NEEDS_CACHE
TRAIN = TrainConfig(pretrained_model_name_or_path="base", train_data_dir="data")
SPACE = read_space({
    "learning_rate": {"loguniform": ["2e-6", 1e-4]},
    "proportion_empty_prompts": {"uniform": [0, 0.5]},
    "lr_warmup_steps": {"uniform": [3, 7]},
    "gradient_accumulation_steps": {"loguniform": [1, 16]},
    "lr_scheduler": {"choice": ["constant", "cosine"]},
    "max_train_steps": {"choice": [None, 100]},
    "train_batch_size": {"grid": [4, 8]},
    "gradient_checkpointing": {"grid": [False, True]},
    "mixed_precision": {"grid": ["no", "fp16", "bf16"]},
})  # fmt: skip
"""Every kind, over every type."""

OTHERS: dict[str, Any] = {
    "controlnet_model_name_or_path": "other", "tokenizer_name": "other", "proportion_empty_prompts": 0.5,
    "learning_rate": 1e-5, "scale_lr": True, "lr_scheduler": "cosine", "lr_warmup_steps": 0, "lr_num_cycles": 2,
    "lr_power": 2.0, "use_8bit_adam": True, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_weight_decay": 0.0,
    "adam_epsilon": 1e-6, "max_grad_norm": 2.0, "set_grads_to_none": True, "train_batch_size": 8,
    "num_train_epochs": 2, "max_train_steps": 10, "gradient_accumulation_steps": 2, "gradient_checkpointing": True,
    "mixed_precision": "bf16", "allow_tf32": True, "enable_xformers_memory_efficient_attention": True,
    "loss": "huber", "huber_delta": 0.2, "snr_gamma": 5.0, "timestep_sampling": "high_noise",
    "logit_mean": 0.5, "logit_std": 0.5, "high_noise_power": 2.0, "noise_offset": 0.1, "input_perturbation": 0.1,
    "rescale_betas_zero_snr": True,
    "compile": True, "use_ema": True, "ema_decay": 0.9, "optimizer": "torch.optim.RAdam",
    "optimizer_args": "amsgrad=true",
    "pretrained_model_name_or_path": "other", "revision": "other", "variant": "fp16", "dataset_name": "other",
    "dataset_config_name": "other", "train_data_dir": "other", "image_column": "other",
    "conditioning_image_column": "other", "caption_column": "other", "resolution": 256, "latents_dtype": "float32",
    "pretrained_vae_model_name_or_path": "other", "image_interpolation_mode": "lanczos", "size_conditioning": "real",
    "crops_coords_top_left_h": 8, "crops_coords_top_left_w": 8, "base_config": "other",
    "crop": "top", "random_flip": True, "aspect_buckets": True, "cuda_graphs": "off",
}  # fmt: skip
"""Name of a setting -> a value that is not its default."""


def problems(space: Any) -> tuple[str, ...]:
    """Return the problems of reading `space`."""
    with pytest.raises(ConfigError) as error:
        read_space(space)
    return error.value.problems


def problem(name: str, entry: Any) -> str:
    """Return the one problem of reading `entry`, without its place."""
    (found,) = problems({name: entry})
    assert found.startswith(f"--space: {name}: ")
    return found.removeprefix(f"--space: {name}: ")


def checked(space: Mapping[str, Any] | Path, train: TrainConfig = TRAIN, **others: Any) -> list[str]:
    """Return the problems of a sweep over `space`."""
    try:
        SweepConfig(train=train, space=space, **others)
    except ConfigError as error:
        return list(error.problems)
    return []


# --- which settings ---


@pytest.mark.parametrize("name", FACTS)
def test_every_setting_says_what_it_is(name: str) -> None:
    """A new setting says in its declaration whether a sweep may try it, and if not, why."""
    assert len({"sweepable", "decides_measurement", "fixed"} & FACTS[name].keys()) == 1
    assert FACTS[name].keys() <= Facts.__annotations__.keys()
    assert "sweepable" in FACTS[name] or FACTS[name].get("decides") is None


def test_a_setting_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be swept, and its values are not shown."""
    monkeypatch.setitem(FACTS, "lr_power", {})
    assert problem("lr_power", {"choice": ["the-secret"]}) == (
        "cannot be swept: it is not declared as a setting that trials may try; set it for all trials with --lr_power"
    )


def test_secrets_are_never_swept() -> None:
    assert names_with("secret") == ("hub_token",)
    assert "fixed" in FACTS["hub_token"]


def test_facts_agree_with_what_prepare_needs() -> None:
    """`prepare_command` names exactly what decides a latent cache."""
    from raycontrolnet.latents.plan import prepare_command

    assert set(OTHERS) == SWEEPABLE | NEEDS_CACHE
    for name, value in OTHERS.items():
        train = TRAIN
        if name in ("dataset_name", "dataset_config_name"):
            train = dataclasses.replace(TRAIN, train_data_dir=None, dataset_name="data")
        changed = dataclasses.replace(train, **{name: value})
        assert (prepare_command(changed) != prepare_command(train)) == (name in NEEDS_CACHE), name


@pytest.mark.parametrize("name", sorted(SWEEPABLE))
def test_what_may_be_swept_is_accepted(name: str) -> None:
    assert checked({name: {"choice": [getattr(TRAIN, name), OTHERS[name]]}}) == []


OWN_CACHE = "each value needs its own latent cache, which takes time and disk; add --allow_new_caches to make them"


@pytest.mark.parametrize("name", sorted(NEEDS_CACHE - {"dataset_name", "dataset_config_name"}))
def test_settings_with_a_cache_of_their_own(name: str) -> None:
    space = {name: {"choice": [OTHERS[name]]}}
    assert checked(space) == [f"--space: {name}: {OWN_CACHE}"]
    assert checked(space, allow_new_caches=True) == []
    assert checked(space, dataclasses.replace(TRAIN, cache_latents="off")) == []


def test_one_folder_holds_one_cache() -> None:
    train = dataclasses.replace(TRAIN, latents_cache_dir="latents")
    (found,) = checked({"resolution": {"grid": [256, 512]}}, train, allow_new_caches=True)
    assert found == (
        "--space: resolution: each value needs its own latent cache, and --latents_cache_dir=latents holds only one; "
        "leave --latents_cache_dir out, so that each gets a folder"
    )
    assert checked({"learning_rate": {"uniform": [0, 1]}}, train) == []


@pytest.mark.parametrize("name", names_with("decides_measurement"))
def test_trials_are_measured_alike(name: str) -> None:
    value = "8" if name in ("validation_prompt", "validation_image", "control_fidelity") else 8
    (found,) = checked({name: {"choice": [value]}}, objective="loss")
    why = f"it decides {FACTS[name]['decides_measurement']}, so that the loss of trials could not be compared"
    assert found == f"--space: {name}: cannot be swept: {why}; set it for all trials with --{name}"


def test_trials_with_other_losses_are_not_ranked_by_the_loss() -> None:
    """They are by what is measured on held-out rows, which is the same figure for all."""
    names = names_that_decide("training loss")
    assert len(names) == 10
    for name in names:
        (found,) = checked({name: {"choice": [OTHERS[name]]}}, objective="loss")
        assert found == (
            f"--space: {name}: cannot be swept: it decides what the training loss is, so that the loss of trials could "
            "not be compared; rank them by --objective val_loss or control_gap"
        )
        for objective in ("val_loss", "control_gap", "images_per_second"):
            assert checked({name: {"choice": [OTHERS[name]]}}, objective=objective) == []


@pytest.mark.parametrize("name", names_with("fixed"))
@pytest.mark.parametrize("entry", ["the-secret", {"choice": ["the-secret", "the-secret"]}, {"the-secret": 1}])
def test_fixed_settings_are_refused_unseen(name: str, entry: Any) -> None:
    """Their values may be secret."""
    text = problem(name, entry)
    assert text.startswith(f"cannot be swept: it {FACTS[name]['fixed']}; ")
    assert "the-secret" not in text
    assert checked({name: entry}) == [f"--space: {name}: {text}"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "output_dir",
            "is the sweep's folder, and every trial gets its own inside; name the sweep's folder with --output_dir",
        ),
        (
            "resume_from_checkpoint",
            "is for single runs, as trials start from the beginning; resume a sweep with --resume",
        ),
        ("hub_token", "is a secret and does not change what is learned; set HF_TOKEN"),
        ("report_to", "decides where metrics go, not what is learned; set it for all trials with --report_to"),
        ("address", "decides what the machines do, not what is learned; set it for all trials with --address"),
    ],
)
def test_the_reason_of_a_refusal(name: str, text: str) -> None:
    assert refusal(name, "val_loss") == f"cannot be swept: it {text}"


# --- the grammar ---


def test_the_default_space() -> None:
    assert read_space(None) == {
        "learning_rate": Dimension("loguniform", (2e-6, 1e-4)),
        "lr_scheduler": Dimension("choice", ("constant", "cosine")),
        "proportion_empty_prompts": Dimension("uniform", (0.0, 0.5)),
    }
    assert checked(DEFAULT_SPACE) == checked(DEFAULT_SPACE, searcher="optuna") == []


def test_a_file_is_read(tmp_path: Path) -> None:
    """2e-6 is a text to YAML 1.1."""
    file = tmp_path / "space.yaml"
    file.write_text(
        "learning_rate: {loguniform: [2e-6, 1e-4]}\nadam_epsilon: {choice: [1e-8, 1e-6]}\n"
        "lr_warmup_steps: {uniform: [0, 500]}\ntrain_batch_size: {grid: [4, 8]}\n"
        "mixed_precision: {choice: [null, 'no']}\n"
    )
    assert yaml.safe_load(file.read_text())["learning_rate"]["loguniform"] == ["2e-6", "1e-4"]
    space = read_space(file)
    assert space == read_space(str(file))
    assert space == {
        "learning_rate": Dimension("loguniform", (2e-6, 1e-4)),
        "adam_epsilon": Dimension("choice", (1e-8, 1e-6)),
        "lr_warmup_steps": Dimension("uniform", (0, 500), whole=True),
        "train_batch_size": Dimension("grid", (4, 8)),
        "mixed_precision": Dimension("choice", (None, "no")),
    }


def test_words_of_a_file_that_yaml_takes_for_booleans(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("mixed_precision: {choice: [no, bf16]}\nscale_lr: {grid: [yes, no]}\n")
    dimensions = {"mixed_precision": Dimension("choice", ("no", "bf16")), "scale_lr": Dimension("grid", (True, False))}
    assert read_space(space) == dimensions
    file = tmp_path / "c.yaml"
    indented = space.read_text().replace("\n", "\n  ")
    file.write_text(f"pretrained_model_name_or_path: base\ntrain_data_dir: data\nspace:\n  {indented}")
    found = parse("tune", ["--config", str(file)])
    assert found.parsed_space == dimensions
    assert json.loads(json.dumps(to_grammar(found.parsed_space)))["mixed_precision"] == {"choice": ["no", "bf16"]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("", "names no settings; add some, such as learning_rate: {loguniform: [2e-6, 1e-4]}, or leave out --space"),
        ("learning_rat: {uniform: [0, 1]}", "unknown setting learning_rat; perhaps you meant learning_rate"),
        ("lr_scheduler: {choice: []}", "lr_scheduler: choice: []: is empty; list the values to try"),
    ],
)
def test_a_file_that_is_no_space(content: str | None, text: str, tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    if content is not None:
        file.write_text(content)
    (found,) = problems(file)
    assert found.startswith(f"--space={file}: {text}")


def test_a_mapping_that_is_no_space() -> None:
    assert problems([]) == ("--space: must be a mapping, such as learning_rate: {loguniform: [2e-6, 1e-4]}",)
    assert problems({"qqq": {"choice": [1]}, 3: 4}) == (
        "--space: unknown setting qqq; raycontrolnet train --help lists the settings",
        "--space: unknown setting 3; raycontrolnet train --help lists the settings",
    )


def test_all_problems_at_once() -> None:
    space = {"hub_tokn": "the-secret", "learning_rate": 1e-5, "lr_power": {"uniform": ["a", "b"]}, "output_dir": 3}
    found = problems(space)
    assert [line.split(":")[1].strip() for line in found] == [
        "unknown setting hub_tokn; perhaps you meant hub_token", "learning_rate", "lr_power", "lr_power", "output_dir",
    ]  # fmt: skip
    assert "the-secret" not in str(found)


@pytest.mark.parametrize(
    ("name", "entry", "text"),
    [
        ("learning_rate", 1e-5, "1e-05: is a single value; give it as a flag: --learning_rate 1e-05"),
        ("tokenizer_name", "a b", "a b: is a single value; give it as a flag: --tokenizer_name 'a b'"),
        ("scale_lr", True, "True: is a single value; give it as a flag: --scale_lr"),
        ("scale_lr", False, "False: is a single value; give it as a flag: --no_scale_lr"),
        ("learning_rate", ["1e-5", 1e-4], "[1e-5, 0.0001]: is a list; perhaps you meant {choice: [1e-5, 0.0001]}"),
        ("learning_rate", None, "no values are given; list them with {choice: [...]}"),
        ("learning_rate", {}, "{}: names no kind of uniform, loguniform, choice, grid"),
        ("learning_rate", {"uniform": [0, 1], "grid": [1]},
         "uniform, grid: are several kinds; keep one of uniform, loguniform, choice, grid"),
        ("learning_rate", {"log_uniform": [0, 1]},
         "log_uniform: must be one of uniform, loguniform, choice, grid; perhaps you meant loguniform"),
        ("learning_rate", {7: [0, 1]}, "7: must be one of uniform, loguniform, choice, grid"),
        ("lr_power", {"uniform": 3}, "uniform: 3: must be two numbers, [low, high]"),
        ("lr_power", {"uniform": [0, 1, 2]}, "uniform: [0, 1, 2]: must be two numbers, [low, high]"),
        ("lr_power", {"uniform": [0, "much"]}, "uniform: [0, much]: much: must be a number"),
        ("lr_power", {"uniform": [0, None]}, "uniform: [0, None]: None: must be a number"),
        ("lr_power", {"uniform": [0, True]}, "uniform: [0, True]: True: must be a number"),
        ("lr_power", {"uniform": [0, math.inf]}, "uniform: [0, inf]: inf: must be finite"),
        ("lr_power", {"uniform": [2, 1]}, "uniform: [2, 1]: low must be below high; perhaps you meant [1.0, 2.0]"),
        ("lr_power", {"uniform": [2, 2]},
         "uniform: [2, 2]: is a single value; give it as a flag: --lr_power 2.0"),
        ("lr_power", {"loguniform": [0, 2]},
         "loguniform: [0, 2]: low must be above 0, as its logarithm is taken; raise it, or use uniform"),
        ("lr_warmup_steps", {"uniform": [0, 2.5]}, "uniform: [0, 2.5]: 2.5: must be a whole number"),
        ("max_train_steps", {"uniform": [None, 2]}, "uniform: [None, 2]: None: must be a whole number"),
        ("lr_scheduler", {"uniform": ["constant", "cosine"]},
         "uniform: is for numbers, which lr_scheduler is not; list its values with {choice: [...]}"),
        ("scale_lr", {"loguniform": [0, 1]},
         "loguniform: is for numbers, which scale_lr is not; list its values with {choice: [...]}"),
        *(
            ("lr_power", {"loguniform": ends},
             f"loguniform: {ends}: low must be above 0, as its logarithm is taken; raise it, or use uniform")
            for ends in ([2, -1], [2, 0], [-1, -2])  # swapping the ends would not help
        ),
        ("lr_scheduler", {"choice": "cosine"}, "choice: cosine: must be a list, such as [cosine]"),
        ("lr_scheduler", {"grid": None}, "grid: None: must be a list"),
        ("lr_scheduler", {"grid": []}, "grid: []: is empty; list the values to try"),
        ("lr_power", {"choice": [1, "1.0"]}, "choice: 1.0: is listed twice; list every value once"),
        ("lr_power", {"grid": [1, "x"]}, "grid: x: must be a number"),
        ("lr_warmup_steps", {"choice": ["1", 2]}, "choice: 1: must be a whole number"),
        ("lr_warmup_steps", {"choice": [[1], 2]}, "choice: [1]: must be a whole number"),
        ("scale_lr", {"choice": ["true", True]}, "choice: true: must be true or false"),
        ("mixed_precision", {"choice": [False, "bf16"]},
         'choice: False: must be a text; YAML reads no, off, yes and on as true or false: put it in quotes, as in "no"'
         ),
    ],
)  # fmt: skip
def test_an_entry_that_is_wrong(name: str, entry: Any, text: str) -> None:
    assert problem(name, entry) == text


def test_the_place() -> None:
    assert place_of(None) == place_of({}) == "--space"
    assert place_of("a.yaml") == place_of(Path("a.yaml")) == "--space=a.yaml"


@pytest.mark.parametrize("through", [lambda plain: json.loads(json.dumps(plain)),
                                     lambda plain: yaml.safe_load(yaml.safe_dump(plain))])  # fmt: skip
def test_the_grammar_comes_back(through: Any) -> None:
    for space in (SPACE, read_space(None)):
        assert read_space(through(to_grammar(space))) == space
    assert to_grammar(read_space(None)) == DEFAULT_SPACE
    pairs = {"validation_prompt": {"choice": [["a", "b"], "c"]}}
    assert through(to_grammar(read_space(pairs))) == {"validation_prompt": {"choice": [["a", "b"], ["c"]]}}


# --- what a run would refuse ---


@pytest.mark.parametrize(
    ("space", "found"),
    [
        ({"lr_scheduler": {"choice": ["constan", "cosine", "x"]}},
         [f"lr_scheduler: constan: must be one of {', '.join(LR_SCHEDULERS)}; perhaps you meant constant",
          f"lr_scheduler: x: must be one of {', '.join(LR_SCHEDULERS)}"]),
        ({"proportion_empty_prompts": {"uniform": [-0.5, 2]}},
         ["proportion_empty_prompts: -0.5: must be in [0, 1]", "proportion_empty_prompts: 2.0: must be in [0, 1]"]),
        ({"train_batch_size": {"grid": [0, 4]}, "lr_warmup_steps": {"uniform": [-5, 5]}},
         ["train_batch_size: 0: must be at least 1", "lr_warmup_steps: -5: must be at least 0"]),
        ({"resolution": {"uniform": [256, 512]}},
         ["resolution: uniform: 257: must be divisible by 8; use 256 or 264; list the values with {choice: [...]}"]),
        ({"resolution": {"choice": [256, 300]}}, ["resolution: 300: must be divisible by 8; use 296 or 304"]),
        ({"pretrained_model_name_or_path": {"choice": [""]}},
         ["pretrained_model_name_or_path: '': required; a local folder or a Hub id of a Stable Diffusion model"]),
        ({"dataset_config_name": {"choice": ["other"]}}, ["dataset_config_name: other: needs --dataset_name"]),
    ],
)  # fmt: skip
def test_values_that_a_run_would_refuse(space: dict[str, Any], found: list[str], tmp_path: Path) -> None:
    assert checked(space, allow_new_caches=True) == [f"--space: {line}" for line in found]
    file = tmp_path / "f.yaml"
    file.write_text(yaml.safe_dump(space, sort_keys=False))
    assert checked(file, allow_new_caches=True) == [f"--space={file}: {line}" for line in found]


@pytest.mark.parametrize(
    ("space", "found"),
    [
        ({"optimizer": ["torch.optim.RAdam", "torch.optim.NAdam"],
          "optimizer_args": [{"weight_decay": 0.1}, {"weight_decay": 0.01}]}, []),
        ({"optimizer": ["torch.optim.AdamW", "torch.optim.RAdam"], "optimizer_args": ["weight_decay=0.1", "lr=1"]},
         [("optimizer torch.optim.AdamW, optimizer_args weight_decay=0.1: --optimizer_args=weight_decay=0.1: "
          "weight_decay: give it with --adam_weight_decay"),
          "optimizer torch.optim.AdamW, optimizer_args lr=1: --optimizer_args=lr=1: lr: give it with --learning_rate"]),
        ({"optimizer": ["torch.optim.AdamW", "torch.optim.RAdam"], "use_8bit_adam": [False, True]},
         [("optimizer torch.optim.RAdam, use_8bit_adam True: --use_8bit_adam, --optimizer=torch.optim.RAdam: are two "
          "optimizers; leave out one")]),
        ({"compile": [True, False], "enable_xformers_memory_efficient_attention": [True]},
         [("compile True, enable_xformers_memory_efficient_attention True: --compile=True: does not go with "
          "--enable_xformers_memory_efficient_attention; leave out one")]),
        ({"dataset_config_name": ["a", "b"], "dataset_name": ["other"]}, []),
        ({"dataset_config_name": ["a", "b"], "dataset_name": ["other", None]},
         ["dataset_name None, dataset_config_name a: --dataset_config_name=a: needs --dataset_name",
          "dataset_name None, dataset_config_name b: --dataset_config_name=b: needs --dataset_name"]),
        ({"train_data_dir": [["one", "other"]], "caption_column": ["text", ["text", "prompt"]]}, []),
        ({"train_data_dir": ["one", ["one", "other"]], "caption_column": ["text", ["text", "prompt"]]},
         [("train_data_dir one, caption_column [text, prompt]: --caption_column=text prompt: 2 for 1 source; give one "
          "for all, or one for each")]),
    ],
)  # fmt: skip
def test_values_are_checked_together(space: dict[str, Any], found: list[str]) -> None:
    """Check values that trials may draw, not the defaults of settings that the space has."""
    choices = {name: {"choice": values} for name, values in space.items()}
    assert checked(choices, allow_new_caches=True) == [f"--space: {line}" for line in found]


def test_all_settings_that_depend_on_each_other_are_checked_together() -> None:
    """For two that do, the problems of both together are others than those of each."""

    def problems_of(*names: str) -> set[str]:
        try:
            dataclasses.replace(TRAIN, **{name: OTHERS[name] for name in names})
        except ConfigError as error:
            return set(error.problems)
        return set()

    alone = {name: problems_of(name) for name in OTHERS}
    pairs = itertools.combinations(OTHERS, 2)
    dependent = [(one, other) for one, other in pairs if problems_of(one, other) != alone[one] | alone[other]]
    assert len(dependent) >= 4
    for pair in dependent:
        assert any(set(pair) <= set(group) for group in TOGETHER), pair


def test_optuna_goes_through_no_grid() -> None:
    space = {"train_batch_size": {"grid": [4, 8]}, "lr_power": {"choice": [1, 2]}}
    assert checked(space) == []
    (found,) = checked(space, searcher="optuna")
    assert found == (
        "--space: train_batch_size: grid: optuna chooses values by itself and cannot go through a grid; use "
        "{choice: [4, 8]}, or --searcher random"
    )


def test_all_problems_of_a_check_at_once() -> None:
    space = {"seed": {"choice": [1]}, "resolution": {"grid": [300]}, "lr_power": {"choice": [1]}}
    assert [line.split(": ")[1:3] for line in checked(space, searcher="optuna")] == [
        ["seed", "cannot be swept"],
        ["resolution", OWN_CACHE],
        ["resolution", "grid"],
        ["resolution", "300"],
    ]  # fmt: skip


# --- draws ---


def drawn(name: str, entry: Any, count: int) -> list[Any]:
    space = read_space({name: entry})
    return [draw(space, 0, index)[name] for index in range(count)]


def test_draws_are_what_a_run_takes() -> None:
    """In range, of exactly the setting's type, and accepted."""
    for index in range(300):
        settings = draw(SPACE, 5, index)
        assert list(settings) == list(SPACE)
        train = dataclasses.replace(TRAIN, **settings)
        for name, value in settings.items():
            dimension = SPACE[name]
            if dimension.is_range:
                assert dimension.values[0] <= value <= dimension.values[1]
                assert type(value) is (int if dimension.whole else float)
            else:
                assert value in dimension.values
            assert getattr(train, name) == value == coerce(value, TYPES[name])


def test_draws_are_a_function_of_seed_and_index() -> None:
    settings = [draw(SPACE, 5, index) for index in range(100)]
    assert settings == [draw(SPACE, 5, index) for index in range(100)]
    assert settings != [draw(SPACE, 6, index) for index in range(100)]
    for name in ("learning_rate", "proportion_empty_prompts"):
        assert len({found[name] for found in settings}) == 100
        assert {found[name] for found in settings}.isdisjoint(draw(SPACE, 6, index)[name] for index in range(100))


def test_draws_stay_what_they_are() -> None:
    """Over versions of this package and of Python: a sweep that is resumed draws its trials again."""
    assert draw(read_space(None), 0, 0) == {
        "learning_rate": pytest.approx(6.639047978535956e-05, rel=1e-12),
        "lr_scheduler": "cosine",
        "proportion_empty_prompts": pytest.approx(0.16477191394653318, rel=1e-12),
    }


def test_another_setting_changes_no_draw() -> None:
    larger = {"adam_beta1": Dimension("uniform", (0.5, 0.9)), "lr_power": Dimension("choice", (1.0, 2.0)), **SPACE}
    for index in range(50):
        found = draw(larger, 5, index)
        assert {name: found[name] for name in SPACE} == draw(SPACE, 5, index)
        assert draw(dict(reversed(SPACE.items())), 5, index) == draw(SPACE, 5, index)


def test_ranges_are_drawn_from_evenly() -> None:
    """A loguniform one is even in the logarithm."""
    values = drawn("lr_power", {"uniform": [2, 6]}, 4000)
    assert tenths([(value - 2) / 4 for value in values]) == pytest.approx([400] * 10, abs=80)
    values = drawn("learning_rate", {"loguniform": [1e-6, 1e-2]}, 4000)
    assert tenths([math.log10(value / 1e-6) / 4 for value in values]) == pytest.approx([400] * 10, abs=80)


def tenths(shares: list[float]) -> list[int]:
    """Return the number of shares in each tenth of [0, 1]."""
    counts = collections.Counter(min(int(share * 10), 9) for share in shares)
    return [counts[index] for index in range(10)]


def test_whole_numbers_are_drawn_fairly() -> None:
    counts = collections.Counter(drawn("lr_warmup_steps", {"uniform": [3, 7]}, 4000))
    assert [counts[value] for value in range(3, 8)] == pytest.approx([800] * 5, abs=110)
    assert sum(counts.values()) == 4000
    counts = collections.Counter(drawn("lr_warmup_steps", {"loguniform": [1, 4]}, 4000))
    shares = [math.log((value + 0.5) / (value - 0.5)) / math.log(9) for value in range(1, 5)]
    assert sum(shares) == pytest.approx(1)
    assert [counts[value] / 4000 for value in range(1, 5)] == pytest.approx(shares, abs=0.03)
    assert set(counts) == {1, 2, 3, 4}


def test_choices_are_drawn_evenly() -> None:
    counts = collections.Counter(drawn("max_train_steps", {"choice": [None, 10, 20, 30]}, 4000))
    assert [counts[value] for value in (None, 10, 20, 30)] == pytest.approx([1000] * 4, abs=130)


def test_choices_repeat_only_once_all_combinations_are_drawn() -> None:
    """With each combination of the grids for itself, and then again in another order."""
    space = read_space({
        "lr_power": {"choice": [1, 2, 3]}, "scale_lr": {"grid": [False, True]},
        "lr_scheduler": {"choice": ["constant", "cosine"]},
    })  # fmt: skip
    assert num_combinations(space) == 12
    for seed in range(20):
        settings = [tuple(draw(space, seed, index).items()) for index in range(36)]
        rounds = [settings[start : start + 12] for start in (0, 12, 24)]
        assert [len(set(each)) for each in rounds] == [12, 12, 12]
        assert rounds[0] != rounds[1] != rounds[2]
        assert {settings[index] for index in range(0, 12, 2)}.isdisjoint(settings[index] for index in range(1, 12, 2))
    firsts = collections.Counter(tuple(draw(space, seed, 2).values()) for seed in range(1200))
    assert sorted(firsts.values()) == pytest.approx([200] * 6, abs=60)


def test_draws_of_choices_stay_what_they_are() -> None:
    """A sweep that is resumed, with more trials too, draws those that have not begun again."""
    space = read_space({"lr_power": {"choice": [1, 2]}, "lr_scheduler": {"choice": ["constant", "cosine"]}})
    drawn = [draw(space, 0, index) for index in range(4)]
    assert [tuple(settings.values()) for settings in drawn] == [
        (2.0, "cosine"),
        (2.0, "constant"),
        (1.0, "cosine"),
        (1.0, "constant"),
    ]


def test_many_choices_are_drawn_in_no_time() -> None:
    """The last of 500 trials looks at all before it."""
    values = [float(value) for value in range(1, 24)]
    space = {name: Dimension("choice", tuple(values)) for name in ("lr_power", "max_grad_norm")}
    started = time.process_time()
    assert len({tuple(draw(space, 0, index).values()) for index in range(490, 500)}) == 10
    assert time.process_time() - started < 2


def test_all_draws_are_those_of_each() -> None:
    """Also where trials are repeated, and for each turn through the grids."""
    choices = {name: Dimension("choice", (1.0, 2.0, 3.0)) for name in ("lr_power", "max_grad_norm")}
    grid = {"lr_scheduler": Dimension("grid", ("constant", "cosine"))}
    for space in (SPACE, choices, choices | grid, grid):
        assert list(draws(space, 3, 40)) == [draw(space, 3, index) for index in range(40)]
    assert len({tuple(each.values()) for each in draws(choices | grid, 3, 18)}) == 18


@pytest.mark.parametrize("low", [1e-300, 1e-6, 0.5])
@pytest.mark.parametrize("kind", ["uniform", "loguniform"])
def test_the_ends_of_a_range(low: float, kind: str) -> None:
    """Rounding leads nowhere outside."""
    dimension = Dimension(kind, (low, 0.7))
    assert dimension.at(0) == pytest.approx(low, rel=1e-9)
    assert dimension.at(math.nextafter(1, 0)) == pytest.approx(0.7, rel=1e-9)
    assert low <= dimension.at(0) <= dimension.at(math.nextafter(1, 0)) <= 0.7
    assert Dimension("uniform", (-1.5e308, 1.5e308)).at(0.5) == 0
    whole = Dimension(kind, (3, 7), whole=True)
    assert (whole.at(0), whole.at(math.nextafter(1, 0))) == (3, 7)


def test_grids_are_covered_by_every_sample() -> None:
    grids = ["gradient_checkpointing", "mixed_precision", "train_batch_size"]
    total = num_trials(SPACE, 5)
    assert total == 5 * 2 * 3 * 2
    settings = [draw(SPACE, 0, index) for index in range(total)]
    combinations = [tuple(found[name] for name in grids) for found in settings]
    assert combinations[:12] == list(itertools.product([False, True], ["no", "fp16", "bf16"], [4, 8]))
    assert set(collections.Counter(combinations).values()) == {5}
    assert len({found["learning_rate"] for found in settings}) == total


def test_without_a_grid_there_are_as_many_trials_as_samples() -> None:
    assert num_trials(read_space(None), 7) == 7
    few = read_space({"lr_scheduler": {"choice": ["constant"]}})
    assert num_trials(few, 7) == 7
    assert draw(few, 0, 6) == {"lr_scheduler": "constant"}


# --- optuna, and what is imported ---


def test_optuna_proposes_the_same_values() -> None:
    distributions = pytest.importorskip("optuna.distributions")
    found = optuna_distributions(SPACE)
    assert found == {
        "learning_rate": distributions.FloatDistribution(2e-6, 1e-4, log=True),
        "proportion_empty_prompts": distributions.FloatDistribution(0, 0.5),
        "lr_warmup_steps": distributions.IntDistribution(3, 7),
        "gradient_accumulation_steps": distributions.IntDistribution(1, 16, log=True),
        "lr_scheduler": distributions.CategoricalDistribution(("constant", "cosine")),
        "max_train_steps": distributions.CategoricalDistribution((None, 100)),
        "train_batch_size": distributions.CategoricalDistribution((4, 8)),
        "gradient_checkpointing": distributions.CategoricalDistribution((False, True)),
        "mixed_precision": distributions.CategoricalDistribution(("no", "fp16", "bf16")),
    }
    for index in range(20):
        for name, value in draw(SPACE, 0, index).items():
            assert found[name]._contains(found[name].to_internal_repr(value))


def test_optuna_takes_the_distributions() -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    for _ in range(12):
        trial = study.ask(optuna_distributions(SPACE))
        for name, value in trial.params.items():
            assert type(value) is type(coerce(value, TYPES[name]))
        dataclasses.replace(TRAIN, **trial.params)
        study.tell(trial, trial.params["learning_rate"])


def test_importing_and_reading_loads_nothing_heavy() -> None:
    code = (
        "import sys; from raycontrolnet.config.space import draw, read_space; draw(read_space(None), 0, 0); "
        "print(*sorted({'numpy', 'optuna', 'ray', 'torch', 'yaml'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert loaded.split() == []


def test_no_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^--space: has no value; name a YAML file, or leave it out for the default"):
        read_space("")
