"""Types of settings on the command line, where tyro's own rules would be others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry

_METAVARS: dict[Any, str] = {
    str | None: "STR",
    tuple[str, ...] | None: "[STR [STR ...]]",
    str | tuple[str, ...]: "STR [STR ...]",
    str | tuple[str, ...] | None: "STR [STR ...]",
    tuple[float, ...] | None: "[FLOAT [FLOAT ...]]",
}
"""Types of settings that tyro would show or read otherwise -> what --help shows."""


def flag_types() -> ConstructorRegistry:
    """Return tyro's types with a rule for optional texts: `None` on the command line is a text like any other."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def optional_text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if info.type not in _METAVARS:
            return None
        metavar = _METAVARS[info.type]
        return PrimitiveConstructorSpec(
            nargs=1 if metavar == "STR" else "*",
            metavar=metavar,
            instance_from_str=(lambda args: args[0]) if metavar == "STR" else tuple,
            is_instance=lambda value: value is None or isinstance(value, (str, tuple)),
            str_from_instance=lambda value: list(map(str, value)) if isinstance(value, tuple) else [str(value)],
        )

    return registry
