"""Write settings.md, the list of all settings, from the classes that declare them. Takes 2 seconds.

python examples/guides/make_settings.py
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Union

from raycontrolnet.config.check_config import CheckSettings
from raycontrolnet.config.condition_config import CONDITION_GROUPS
from raycontrolnet.config.declare import facts_of, title
from raycontrolnet.config.generate_config import GENERATE_GROUPS
from raycontrolnet.config.named_values import NamedValues
from raycontrolnet.config.sweep_config import SweepSettings
from raycontrolnet.config.train_config import GROUPS
from raycontrolnet.config.values import setting_types
from raycontrolnet.demo.demo import BASE, demo_settings

PAGE = Path(__file__).with_name("settings.md")

INTRODUCTION = """\
# Settings

<!-- Written by examples/guides/make_settings.py. To change it, change the settings' docstrings and run that again. -->

A setting has one name: as a flag, as an argument in Python (`TrainConfig(learning_rate=1e-5)`) and, for `train`,
`tune`, `check`, `prepare` and `demo`, as a key in the YAML file of `--config`. Flags override the file. A `switch`
takes no value: `--push_to_hub` turns it on, `--no_push_to_hub` off. Several values are separated by spaces. The space
of a sweep can name the settings that are marked with *: trials may have different values.

`--use_8bit_adam`, xformers, Weights & Biases, Comet and Optuna need more packages:
`pip install '.[8bit,xformers,wandb,comet,optuna]'`, or those of them that you use.
"""
SHARED = "All settings of `raycontrolnet train`, which apply to every trial, and these."
COMMANDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "train": ("`raycontrolnet prepare` takes the same flags.", GROUPS),
    "tune": (f"{SHARED} In a file and in Python, `space` can also be the mapping itself.", (SweepSettings,)),
    "check": ("All settings of `raycontrolnet train`, and these.", (CheckSettings,)),
    "generate": ("", GENERATE_GROUPS),
    "condition": ("", CONDITION_GROUPS),
}
"""Command -> a note on it, and the groups of its settings."""


def main() -> None:
    """Write the page."""
    PAGE.write_text(settings_page(), encoding="utf-8")


def settings_page() -> str:
    """Return the page's text."""
    paragraphs = [INTRODUCTION]
    for command, (note, groups) in COMMANDS.items():
        paragraphs += [f"## raycontrolnet {command}\n"] + [f"{note}\n"] * bool(note)
        paragraphs += ["\n".join(table_lines(group)) + "\n" for group in groups]
    defaults = [f"`--{name} {value}`" for name, value in demo_settings.items() if value != str(BASE)]
    paragraphs.append("## raycontrolnet demo\n\nThe settings of `raycontrolnet train`, with other defaults:\n")
    paragraphs.append(", ".join(defaults) + ".\n")
    return "\n".join(paragraphs)


def table_lines(group: Any) -> Iterator[str]:
    """Return the lines of a group's heading and table."""
    yield from (f"### {title(group)}\n", "| Setting | Type | Default | Meaning |", "|---|---|---|---|")
    meanings, facts = field_docstrings(group), facts_of(group)
    for setting in dataclasses.fields(group):
        kind = type_name(setting_types(group)[setting.name])
        default = "" if setting.default is None or setting.default == "" else f"`{setting.default}`"
        sweepable = " *" if "sweepable" in facts[setting.name] else ""
        yield f"| `--{setting.name}`{sweepable} | {kind} | {default} | {meanings[setting.name]} |"


def type_name(kind: Any) -> str:
    """Return a setting's type as its flag takes it."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        *others, kind = (part for part in typing.get_args(kind) if part is not type(None))
        if others:
            return f"one or {type_name(kind)}"
        return "True or False" if kind is bool else type_name(kind)
    if typing.get_origin(kind) is tuple:
        return f"several {typing.get_args(kind)[0].__name__}"
    if kind is NamedValues:
        return "name=value ..."
    return "switch" if kind is bool else str(kind.__name__)


def field_docstrings(group: Any) -> dict[str, str]:
    """Return the docstring of each field of a class, as the cell of a table."""
    (declaration,) = ast.parse(inspect.getsource(group)).body
    assert isinstance(declaration, ast.ClassDef)
    return {
        field.target.id: " ".join(str(text.value.value).split()).replace("|", "\\|")
        for field, text in pairwise(declaration.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


if __name__ == "__main__":
    main()
