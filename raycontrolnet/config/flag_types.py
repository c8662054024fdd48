"""Rules by which tyro reads settings of our own types: texts that may be none or several, numbers, and named values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raycontrolnet.config.named_values import NamedValues
from raycontrolnet.config.values import NoValue, coerce

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

_NUMBERS: dict[Any, str] = {int: "INT", float: "FLOAT", int | None: "{None}|INT", float | None: "{None}|FLOAT"}
"""Types of settings that are numbers -> what --help shows."""
_METAVARS: dict[Any, str] = {
    str | None: "STR",
    tuple[str, ...] | None: "STR [STR ...]",
    str | tuple[str, ...]: "STR [STR ...]",
    str | tuple[str, ...] | None: "STR [STR ...]",
    tuple[float, ...] | None: "FLOAT [FLOAT ...]",
}
"""Types of settings that tyro would show or read otherwise -> what --help shows."""


def own_types() -> ConstructorRegistry:
    """Return tyro's types with rules for ours: `None` on the command line is a text like any other."""
    from tyro.constructors import ConstructorRegistry

    registry = ConstructorRegistry()
    registry.primitive_rule(_optional_text)
    registry.primitive_rule(_named_values)
    registry.primitive_rule(_number)
    return registry


def as_default(value: Any, kind: Any) -> Any:
    """Return a setting's value as tyro takes it for a default of the type `kind`."""
    return NamedValues(value) if kind == NamedValues | None and value is not None else value


def _optional_text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    from tyro.constructors import PrimitiveConstructorSpec

    if info.type not in _METAVARS:
        return None
    metavar = _METAVARS[info.type]
    return PrimitiveConstructorSpec(
        nargs=1 if metavar == "STR" else "*",
        metavar=metavar,
        instance_from_str=(lambda args: args[0]) if metavar == "STR" else lambda args: tuple(_at_least_one(args)),
        is_instance=lambda value: value is None or isinstance(value, (str, tuple)),
        str_from_instance=lambda value: list(map(str, value)) if isinstance(value, tuple) else [str(value)],
    )


def _named_values(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Return the rule for named values, which may be one argument or several."""
    from tyro.constructors import PrimitiveConstructorSpec

    if info.type != NamedValues | None:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME=VALUE [NAME=VALUE ...]",
        instance_from_str=lambda args: " ".join(_at_least_one(args)),
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
    )


def _number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Return the rule for numbers, whose messages are those of a file's values."""
    from tyro.constructors import PrimitiveConstructorSpec

    if info.type not in _NUMBERS:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=_NUMBERS[info.type],
        instance_from_str=lambda args: _as_number(args[0], info.type),
        is_instance=lambda value: value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)),
        str_from_instance=lambda value: [str(value)],
    )


def _as_number(text: str, kind: Any) -> Any:
    whole, optional = "INT" in _NUMBERS[kind], "None" in _NUMBERS[kind]
    if optional and text == "None":
        return None
    try:
        return coerce(int(text) if whole and text.strip() else text, kind)
    except NoValue as error:
        raise ValueError(error.in_words) from None
    except ValueError:
        raise ValueError(f"{text} is not {'a whole number' if whole else 'a number'}") from None


def _at_least_one(args: list[str]) -> list[str]:
    if not args:
        raise ValueError("expected at least one value")
    return args
