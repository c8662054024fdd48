"""Rules by which tyro reads settings of our own types: texts that may be none or several, numbers, and named values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raycontrolnet.config.named_values import NamedValues

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

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


def _at_least_one(args: list[str]) -> list[str]:
    if not args:
        raise ValueError("expected at least one value")
    return args
