"""Columns of a data set."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
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


class MissingColumn(ValueError):
    """A column, or an extension of files in tars, that a source lacks."""

    def __init__(self, setting: str, asked: str, reason: str, *, near: str | None, advice: str):
        """Take the setting and its value, what the source has, the nearest name there, and the advice without one."""
        self.setting, self.asked, self.reason, self.near = setting, asked, reason, near
        advice = f"perhaps you meant {near}" if near else advice
        super().__init__(f"--{setting}={asked}: {reason}{advice and f'; {advice}'}")


class MissingColumns(DataError):
    """The columns that a source lacks; the message says what helps if it is the only source.

    Args:
        missing: one or more.
        unused: names in the source that no setting means, for examples.
        others: other problems of the source.
    """

    def __init__(self, missing: Sequence[MissingColumn], unused: Iterable[str], others: Sequence[str] = ()):
        self.missing, self.others = tuple(missing), tuple(others)
        near = {each.near for each in missing}
        free = iter([name for name in unused if name not in near])
        self.guesses = {each.setting: each.near or next(free, "NAME") for each in missing}
        """Setting -> the name that may be meant."""
        super().__init__("\n".join([*map(str, missing), *others]))

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return DataError, (str(self),)


@dataclass(frozen=True)
class Columns:
    """Names of a data set's columns, in the order of `_CUSTOMARY_NAMES`."""

    image: str
    conditioning_image: str
    caption: str


def find_columns(data: SourceConfig, available: Sequence[str], where: str) -> Columns:
    """Return the columns of `where` (a file or data set, for messages) that `data` asks for.

    A column may also be called `<name>_file_name`, as image folders do. If a setting has the value of its default,
    given or not, the customary names of the known layouts are tried as well; a column of another name must exist.

    Raises:
        MissingColumns: with every column that does not exist.
    """
    found, missing = [], []
    for setting in _CUSTOMARY_NAMES:
        try:
            found.append(find_column(setting, getattr(data, setting), available, where))
        except MissingColumn as column:
            missing.append(column)
    if missing:
        raise MissingColumns(missing, [name for name in available if name not in found])
    return Columns(*found)


def find_column(setting: str, asked: str, available: Sequence[str], where: str) -> str:
    """Return the column of `where` that `setting`, with the value `asked`, means; see `find_columns`.

    Raises:
        MissingColumn: if there is none; names the columns that exist.
    """
    candidates = [asked] if setting == "caption_column" else [asked, f"{asked}_file_name"]
    if asked == getattr(SourceConfig, setting):
        candidates += _CUSTOMARY_NAMES[setting]
    name = next((candidate for candidate in candidates if candidate in available), None)
    if name is None:
        near = difflib.get_close_matches(asked, available, n=1)
        advice = f"name one of them with --{setting}" if available else ""
        has = f"has: {', '.join(available)}" if available else "has no columns"
        reason = f"no such column in {where}, which {has}"
        raise MissingColumn(setting, asked, reason, near=near[0] if near else None, advice=advice)
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
