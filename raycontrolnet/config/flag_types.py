"""Rules by which tyro reads flags of our own types: optional texts, and named values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raycontrolnet.config.named_values import NamedValues

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo


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

    several = info.type == tuple[str, ...] | None
    if not several and info.type != str | None:
        return None
    return PrimitiveConstructorSpec(
        nargs="*" if several else 1,
        metavar="[STR [STR ...]]" if several else "STR",
        instance_from_str=tuple if several else lambda args: args[0],
        is_instance=lambda value: value is None or isinstance(value, (str, tuple)),
        str_from_instance=lambda value: list(value) if isinstance(value, tuple) else [str(value)],
    )


def _named_values(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Return the rule for named values, which may be one argument or several."""
    from tyro.constructors import PrimitiveConstructorSpec

    if info.type != NamedValues | None:
        return None
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME=VALUE [NAME=VALUE ...]]",
        instance_from_str=" ".join,
        is_instance=lambda value: value is None or isinstance(value, str),
        str_from_instance=lambda value: [str(value)],
    )
