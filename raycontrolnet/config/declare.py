"""The declaration of a setting: its default, and the facts about it that other modules need."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, cast

if TYPE_CHECKING:
    from typing_extensions import Unpack

T = TypeVar("T")


class Facts(TypedDict, total=False):
    """Facts about a setting besides its type, default and help text.

    A setting for training says one of `sweepable`, `decides_measurement` and `fixed`. One that says nothing cannot be
    swept or changed when a sweep is resumed, and is passed on as it is.
    """

    sweepable: Literal[True]
    """Trials of a sweep may have different values."""
    decides_measurement: str
    """Its effect on how trials are measured, in words that follow "decides"; all trials of a sweep share its value."""
    fixed: str
    """Reason why all trials of a sweep share its value, in words that follow "it"."""
    instead: str
    """Advice for users who try to sweep a `fixed` setting; by default to use the flag."""
    changes_on_resume: Literal[True]
    """A resumed sweep may have another value."""

    decides: Literal["latents", "length", "warm-up", "training loss"]
    """Consequence of the value: the latent cache, the number of updates, the course of the warm-up, or the figure that
    `loss` is."""
    in_prepare: Literal[True]
    """`raycontrolnet prepare` reads it, although it does not decide what is in the cache."""

    path: Literal["local", "or id", "or URI"]
    """The value is a path, or may be one."""
    model_folders: tuple[str, ...]
    """The value names a model, and a local one must have these folders."""
    package: tuple[str, str]
    """Optional package that the value needs unless it is false, and the extra of raycontrolnet that installs it."""
    gpu_only: tuple[Any, str]
    """Value that needs a GPU, and what to do on the CPU."""

    may_be_empty: Literal[True]
    """An empty text is a value, as of a prompt."""
    left_out_of_card: Literal[True]
    """The value is about this machine or this run's place, and means nothing to the readers of a model card."""
    secret: Literal[True]
    """The value is never shown or stored."""


def setting(default: T, **facts: Unpack[Facts]) -> T:
    """Declare a setting: a dataclass field with its default and facts; its help text is the docstring below it."""
    return dataclasses.field(default=default, repr="secret" not in facts, metadata=cast(Any, facts))


def facts_of(config: type[Any]) -> dict[str, Facts]:
    """Return setting name -> facts, for every setting of the class `config`."""
    return {field.name: cast(Facts, field.metadata) for field in dataclasses.fields(config)}


def title(group: type[Any]) -> str:
    """Return the title of a group of settings: its docstring up to the colon."""
    return (group.__doc__ or group.__name__).partition(":")[0]
