"""Columns of a data set."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raycontrolnet.config.data_sources import SourceConfig
from raycontrolnet.errors import DataError

_KIND_NAMES = {
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}

# setting -> names tried by default: the image-folder convention, then the original ControlNet layout
_CUSTOMARY_NAMES = {
    "image_column": ("file_name", "target"),
    "conditioning_image_column": ("conditioning_image_file_name", "source"),
    "caption_column": ("prompt", "caption"),
}


@dataclass(frozen=True)
class Columns:
    """Names of a data set's columns, in the order of `_CUSTOMARY_NAMES`."""

    image: str
    conditioning_image: str
    caption: str


def find_columns(data: SourceConfig, available: Sequence[str], where: str) -> Columns:
    """Return the columns of `where` (a file or data set, for messages) that `data` asks for.

    A column may also be called `<name>_file_name`, as image folders do. If a setting has its default, the customary
    names of the known layouts are tried as well; a column that the user named must exist.

    Raises:
        DataError: with every column that does not exist.
    """
    found, problems = [], []
    for setting in _CUSTOMARY_NAMES:
        try:
            found.append(find_column(setting, getattr(data, setting), available, where))
        except ValueError as problem:
            problems.append(str(problem))
    if problems:
        raise DataError("\n".join(problems))
    return Columns(*found)


def find_column(setting: str, asked: str, available: Sequence[str], where: str) -> str:
    """Return the column of `where` that `setting`, with the value `asked`, means; see `find_columns`.

    Raises:
        ValueError: if there is none; names the columns that exist.
    """
    candidates = [asked] if setting == "caption_column" else [asked, f"{asked}_file_name"]
    if asked == getattr(SourceConfig, setting):
        candidates += _CUSTOMARY_NAMES[setting]
    name = next((candidate for candidate in candidates if candidate in available), None)
    if name is None:
        near = difflib.get_close_matches(asked, available, n=1)
        advice = f"perhaps you meant {near[0]}" if near else f"name one of them with --{setting}"
        has = f"has: {', '.join(available)}; {advice}" if available else "has no columns"
        raise ValueError(f"--{setting}={asked}: no such column in {where}, which {has}")
    return name


def read_captions(value: Any) -> tuple[str, ...]:
    """Return the captions of one row, at least one.

    Raises:
        ValueError: if `value` is not a text or a list of them; says what it is.
    """
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise ValueError(f"must be a text or a list of texts, is {kind_name(value)}")
    for item in value:
        if not isinstance(item, str):
            raise ValueError(f"must be a text or a list of texts, is a list with {kind_name(item)} in it")
    if not value:
        raise ValueError("must hold at least one caption, is an empty list")
    return tuple(value)


def kind_name(value: Any) -> str:
    """Return JSON's word for the type of `value`, with an article."""
    return _KIND_NAMES.get(type(value), type(value).__name__)
