"""All settings together: checked at once, from flags, YAML or Python, and written out without secrets."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Union

from raycontrolnet.config.output_settings import HubConfig, OutputConfig, ValidationConfig
from raycontrolnet.config.settings import CacheConfig, ClusterConfig, DataConfig, ModelConfig, OptimConfig, StepConfig
from raycontrolnet.errors import ConfigError
from raycontrolnet.text import error_message


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    ClusterConfig,
    HubConfig,
    ValidationConfig,
    OutputConfig,
    StepConfig,
    OptimConfig,
    CacheConfig,
    DataConfig,
    ModelConfig,
):
    """All settings of one training run.

    Raises:
        ConfigError: with every problem at once, each naming the flag, the value and the fix.
    """

    def num_held_out(self, num_rows: int) -> int:
        """How many of the data set's rows are held out."""
        return self.held_out_of(num_rows, min(num_rows, self.max_train_samples or num_rows))

    def __post_init__(self) -> None:
        check_settings(self, GROUPS)


GROUPS: tuple[Any, ...] = TrainConfig.__bases__[::-1]


@cache
def setting_types(config: type[Any] = TrainConfig) -> Mapping[str, Any]:
    """Name -> type of every setting."""
    hints = typing.get_type_hints(config)
    return {setting.name: hints[setting.name] for setting in dataclasses.fields(config)}


def check_settings(config: Any, groups: Sequence[Any]) -> None:
    """Bring the settings of a config that is being made to their types, and look for values that cannot be run.

    Args:
        config: a frozen dataclass.
        groups: the classes that it is made of, whose `problems` are asked for.

    Raises:
        ConfigError: with every problem at once.
    """
    problems = coerce_settings(config, setting_types(config.__class__))
    if not problems:  # the groups' own checks may count on the types
        problems = [problem for group in groups for problem in group.problems(config)]
    if problems:
        raise ConfigError(problems)


def coerce_settings(config: Any, kinds: Mapping[str, Any]) -> list[str]:
    """Bring the settings that `kinds` names to their types; returns what is wrong with those that cannot be."""
    problems = []
    for setting in dataclasses.fields(config):
        if setting.name not in kinds:
            continue
        try:
            value = coerce(getattr(config, setting.name), kinds[setting.name])
            object.__setattr__(config, setting.name, value)
        except ValueError as error:
            shown = "" if setting.metadata.get("secret") else f"={getattr(config, setting.name)!r}"
            problems.append(f"--{setting.name}{shown}: {error}")
    return problems


def coerce(value: Any, kind: Any) -> Any:
    """`value` as the setting's type `kind`.

    Lenient only where YAML and Python leave no doubt: an int or a text such as 1e-5 (a string to YAML 1.1) for a float,
    a number for a text, one text or a list of them for a tuple.

    Raises:
        ValueError: saying which type is expected.
    """
    if typing.get_origin(kind) in (Union, types.UnionType):
        if value is None:
            return None
        (kind,) = (part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is tuple:
        items = [value] if isinstance(value, (str, Path)) else value
        if isinstance(items, (list, tuple)) and all(isinstance(item, (str, Path)) for item in items):
            return tuple(map(str, items)) or None
        raise ValueError("must be a text or a list of texts")
    if kind is float and isinstance(value, (float, int, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isnan(number):  # which every comparison lets through
            raise ValueError("must be a number")
        return number
    if kind is str and isinstance(value, (int, float, Path)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"must be {_TYPE_NAMES[kind]}")


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def from_mapping(settings: Mapping[str, Any], place: str, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`settings` (from `place`, such as a file's name) if every key is a setting's name.

    Args:
        known: the settings' names and types; by default those of a run.

    Raises:
        ConfigError: naming each unknown key and the nearest setting.
    """
    problems, known = [], known or setting_types()
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; perhaps you meant {near[0]}" if near else "; raycontrolnet train --help lists the settings"
            problems.append(f"{place}: unknown setting {name}{hint}")
    if problems:
        raise ConfigError(problems)
    return dict(settings)


def load_yaml(path: str | Path, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings of a YAML file, by the names of the flags.

    Args:
        known: as in `from_mapping`.

    Raises:
        ConfigError: if the file cannot be read, is not a mapping, or has unknown keys.
    """
    place = f"--config={path}"
    return from_mapping(read_yaml(path, place), place, known)


def read_yaml(path: str | Path, place: str) -> dict[Any, Any]:
    """A YAML file of `name: value` lines, whatever the names.

    Raises:
        ConfigError: saying what is wrong at `place`, if the file cannot be read or is no mapping.
    """
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{place}: cannot be read ({error_message(error)})"]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{place}: is not valid YAML ({error_message(error)})"]) from None
    if not isinstance(settings, dict):
        raise ConfigError([f"{place}: must be a list of `setting: value` lines"])
    return settings


def public_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings as plain values without secrets, for config.yaml, manifests, trackers and the model card."""
    return {
        setting.name: list(value) if isinstance(value, tuple) else value
        for setting in dataclasses.fields(config)
        if not setting.metadata.get("secret")
        for value in [getattr(config, setting.name)]
    }


def changed_settings(config: TrainConfig) -> dict[str, Any]:
    """Those of `public_settings` that differ from their defaults."""
    defaults = {setting.name: setting.default for setting in dataclasses.fields(config)}
    return {name: value for name, value in public_settings(config).items() if getattr(config, name) != defaults[name]}
