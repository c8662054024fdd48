"""Values of settings from flags, YAML and Python: brought to the settings' types, and checked together."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Union

from raycontrolnet.config.named_values import NamedValues, as_text
from raycontrolnet.config.rules import NO_VALUE, empty_problems
from raycontrolnet.config.spellings import SPELLINGS
from raycontrolnet.config.yaml_words import load_yaml, value_meant
from raycontrolnet.errors import ConfigError
from raycontrolnet.storage.object_store import ObjectStore
from raycontrolnet.storage.store_requests import reason
from raycontrolnet.storage.uri import ACCESS, UNUSABLE, is_uri, shown_value, split_uri
from raycontrolnet.text import error_message, perhaps

_TYPE_NAMES = {
    int: "a whole number", float: "a number", bool: "true or false", str: "a text", NamedValues: "arguments by name",
}  # fmt: skip


class NoValue(ValueError):
    """A value of the type `kind` is needed, and there is none."""

    def __init__(self, kind: Any) -> None:
        super().__init__(f"must be {_TYPE_NAMES[kind]}")
        self.in_words = f"{NO_VALUE}; give {_TYPE_NAMES[kind]}, or leave it out"
        """The problem of a setting."""


def misfit(error: ValueError, shown: str) -> str:
    """Return the problem of a setting whose value `coerce` refuses, after the value as `shown`, if there is one."""
    return f": {error.in_words}" if isinstance(error, NoValue) else f"{shown}{error}"


@cache
def setting_types(config: type[Any]) -> Mapping[str, Any]:
    """Return setting name -> type, for every setting of the class `config`."""
    hints = typing.get_type_hints(config)
    return {setting.name: hints[setting.name] for setting in dataclasses.fields(config)}


def check_settings(config: Any) -> None:
    """Bring the settings of a new config to their types, and check that they can be run.

    The checks are the `problems` of its groups, in their order. Called in `__post_init__`.

    Raises:
        ConfigError: with every problem at once.
    """
    problems = coerce_settings(config, setting_types(config.__class__))
    if not problems:  # the checks of the groups rely on the types
        checks = [vars(group)["problems"] for group in reversed(config.__class__.__mro__) if "problems" in vars(group)]
        problems = [problem for check in checks for problem in check(config)]
        problems += empty_problems(config, problems)
    if problems:
        raise ConfigError(problems)


def coerce_settings(config: Any, kinds: Mapping[str, Any]) -> list[str]:
    """Bring the settings named in `kinds` to their types, in place; return a problem for each that does not fit."""
    problems = []
    for setting in dataclasses.fields(config):
        if setting.name not in kinds:
            continue
        given = getattr(config, setting.name)
        try:
            object.__setattr__(config, setting.name, coerce(given, kinds[setting.name]))
        except ValueError as error:
            shown = "" if setting.metadata.get("secret") else _shown(given)
            problems.append(f"--{setting.name}{misfit(error, f'{shown}: ')}")
    return problems


def _shown(given: Any) -> str:
    """Return the value of a setting as it follows the flag; several texts are as on the command line."""
    value = shown_value(given)  # without keys in URIs
    if given and isinstance(given, tuple) and all(isinstance(item, str) for item in given):
        return f" {' '.join(value)}"
    return f"={tuple(value) if isinstance(given, tuple) else value!r}"


def coerce(value: Any, kind: Any) -> Any:
    """Return `value` as the setting's type `kind`.

    Only unambiguous conversions are made: an int, or a text such as 1e-5 (a string in YAML 1.1), to a float; a number
    to a text; one text or a list of them to a tuple; a mapping to named values; a `Word` to a text or a boolean.

    Raises:
        NoValue: the value is null or an empty text.
        ValueError: names the expected type.
    """
    if typing.get_origin(kind) in (Union, types.UnionType):
        given = typing.get_args(kind)
        if value is None and type(None) in given:
            return None
        *others, kind = (part for part in given if part is not type(None))
        if others and isinstance(value, (list, tuple)):  # one text or several
            if (items := coerce(value, kind)) is None and type(None) not in given:
                raise ValueError("must name at least one")
            return items[0] if items is not None and len(items) == 1 else items
        kind = others[0] if others else kind
    if typing.get_origin(kind) is tuple:
        return _coerce_items(value, typing.get_args(kind)[0])
    value = value_meant(value, kind)
    if value is None or (kind not in (str, NamedValues) and isinstance(value, str) and not value.strip()):
        raise NoValue(kind)
    if kind is NamedValues:
        return as_text(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and (is_number or isinstance(value, str)):
        return _as_float(value)
    if kind is str and (is_number or isinstance(value, Path)):
        return str(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ValueError(f"must be {_TYPE_NAMES[kind]}")


def _as_float(value: float | str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number):  # NaN would pass every range check
        raise ValueError("must be a number")
    return number


def _coerce_items(value: Any, kind: Any) -> tuple[Any, ...] | None:
    """Return one value or a list of them as a tuple of texts or numbers; None if it is empty."""
    if kind is float and isinstance(value, str) and not value.strip():
        raise NoValue(kind)
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if kind is str and not all(isinstance(item, (str, Path)) for item in items):
        raise ValueError("must be a text or a list of texts")
    if kind is float and any(isinstance(item, str) and re.search(r"[\s,;]", item.strip()) for item in items):
        raise ValueError("must be several numbers: in a file a list, as [1, 3]; as a flag with spaces, as 1 3")
    try:
        return tuple(coerce(item, kind) for item in items) or None
    except ValueError as error:
        raise (ValueError("must be finite numbers") if kind is float else error) from None


def as_flag(name: str, value: Any) -> str:
    """Return a setting as on a command line."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{name}", *(shlex.quote(str(each)) for each in values)])


def unknown_names(settings: Mapping[Any, Any], known: Mapping[str, Any], place: str) -> list[str]:
    """Return a problem for each key of `settings` that is not in `known`, with what it is here or the nearest name.

    Args:
        settings: values by name.
        known: names of settings.
        place: the flag or file that `settings` are from.
    """

    def advice(name: Any) -> str:
        if name in SPELLINGS and "crop" in known:
            return f"; write crop: {SPELLINGS[name]}"
        return perhaps(str(name), known) or "; raycontrolnet train --help lists the settings"

    return [f"{place}: unknown setting {name}{advice(name)}" for name in settings if name not in known]


def _text(path: str) -> str:
    if not is_uri(path):
        return Path(path).read_text(encoding="utf-8")
    folder, name = split_uri(path)
    return ObjectStore(folder).read(name).decode()


def read_yaml(path: str | Path, place: str) -> dict[Any, Any]:
    """Return the content of a YAML file of `name: value` lines, on a disk or in an object store, whatever the names.

    Values may be `Word`s, or hold some; `coerce` takes them.

    Raises:
        ConfigError: names `place`, the flag that the file is from, if it cannot be read or is not a mapping.
    """
    import yaml

    try:
        settings = load_yaml(_text(str(path))) or {}
    except UNUSABLE as error:
        advice = f"; {ACCESS}" if is_uri(str(path)) else ""
        raise ConfigError([f"{place}: cannot be read ({reason(error, 160)}){advice}"]) from None
    except yaml.YAMLError as error:
        advice = "; indent with spaces, not tabs" if "'\\t'" in str(error) else ""
        raise ConfigError([f"{place}: is not valid YAML ({error_message(error)}){advice}"]) from None
    if not isinstance(settings, dict):
        raise ConfigError([f"{place}: must be a list of `setting: value` lines"])
    return settings
