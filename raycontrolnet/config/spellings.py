"""Flags as users write them: the switches of other training scripts, other dashes, values of switches."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from raycontrolnet.errors import ConfigError

SPELLINGS = {"center_crop": "center", "random_crop": "random"}
"""Switch of other training scripts -> value of `crop`."""


def in_our_spelling(flags: Sequence[str]) -> list[str]:
    """Return the arguments of a command that has `--crop`, with each switch as `--crop=VALUE`.

    Raises:
        ConfigError: if a switch contradicts another one or `--crop`.
    """
    values = [SPELLINGS.get(flag.removeprefix("--").replace("-", "_")) if flag[:2] == "--" else None for flag in flags]
    written = {value: flag for flag, value in zip(flags, values, strict=True) if value is not None}
    if written:
        joined = [flag.partition("=")[2] for flag in flags if flag.startswith("--crop=")]
        apart = [value for flag, value in pairwise(flags) if flag == "--crop"]
        written |= {value: f"--crop {value}" for value in joined + apart if value not in written}
    if len(written) > 1:
        raise ConfigError([f"{', '.join(written.values())}: contradict each other; keep one of them"])
    return [flag if value is None else f"--crop={value}" for flag, value in zip(flags, values, strict=True)]


def misspelt(flags: Sequence[str], kinds: Mapping[str, Any]) -> list[str]:
    """Return a problem for each flag with other dashes than two, and for each switch that has a value.

    Args:
        flags: the arguments of a command.
        kinds: setting name -> type.
    """
    problems = []
    for flag, following in pairwise([*flags, "--"]):
        written, has_value, value = flag.partition("=")
        bare = re.sub(r"^[-\u2010-\u2015\u2212]{1,2}", "", written)
        name = bare.replace("-", "_")
        setting = name if name in kinds else name.removeprefix("no_")
        if bare == written or setting not in kinds:
            continue
        if not written.startswith("--"):
            problems.append(f"{written}: flags begin with two hyphens; write --{name}")
        elif kinds[setting] is bool and (has_value or not following.startswith("-")):
            given = value if has_value else following
            problems.append(f"--{name} {given}: is a switch without a value; write --{setting}, or --no_{setting}")
    return problems
