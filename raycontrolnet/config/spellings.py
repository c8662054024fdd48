"""Switches of other training scripts that are values of `crop` here: `--random_crop` and `--center_crop`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from raycontrolnet.errors import ConfigError

SPELLINGS = {"center_crop": "center", "random_crop": "random"}
"""Switch -> value of `crop`."""


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
