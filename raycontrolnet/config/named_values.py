"""Values by their names in one text, as `weight_decay=0.1 betas=[0.9, 0.99]`, JSON or YAML; a file has a mapping."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from raycontrolnet.config.yaml_words import Word


class NamedValues(str):
    """Type of a setting that is such a text, kept as a plain `str`: the same values are the same text."""

    __slots__ = ()


EXAMPLE = "weight_decay=0.1 betas=[0.9,0.99]"
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?e[-+]?\d+", re.IGNORECASE)
"""Numbers that YAML 1.1 takes for texts."""
_NEXT = re.compile(r"\s+(?=[A-Za-z_]\w*=)")


def as_text(given: Any) -> str:
    """Return named values, given as text or mapping, as the one text for them.

    Raises:
        ValueError: says what is wrong with them.
    """
    if not isinstance(given, (str, Mapping)):
        raise ValueError(f"must be values by name, such as {EXAMPLE}")
    values = read_named_values(given)
    try:
        text = " ".join(f"{name}={json.dumps(value, allow_nan=False)}" for name, value in values.items())
    except (TypeError, ValueError):
        raise ValueError("must be numbers, texts, true, false, null, or lists of them") from None
    with suppress(ValueError):
        if read_named_values(text) == values:
            return text
    raise ValueError("must have no text with spaces and = in it")


def read_named_values(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return name -> value.

    Raises:
        ValueError: the text or mapping is none of named values.
    """
    values = given if isinstance(given, Mapping) else _read(given.strip())
    for name in values:
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"{name} is no name; write name=value, such as {EXAMPLE}")
    return {name: _plain(value) for name, value in values.items()}


def _read(text: str) -> Mapping[Any, Any]:
    import yaml

    if not text:
        return {}
    try:
        if text.startswith("{"):
            return dict(yaml.safe_load(text))
        pairs = [part.partition("=") for part in _NEXT.split(text)]
        names = [name for name, _, _ in pairs]
        if bad := next((name for name, equals, _ in pairs if not equals), None):
            raise ValueError(f"{bad} has no value; write name=value, such as {EXAMPLE}")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} is there twice; give it once")
        return {name: yaml.safe_load(value) for name, _, value in pairs}
    except yaml.YAMLError:
        raise ValueError(f"cannot be read; write name=value, such as {EXAMPLE}") from None


def _plain(value: Any) -> Any:
    """Return a value with such numbers as numbers, and words that YAML takes for booleans as booleans."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, Word):
        return value.truth
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
