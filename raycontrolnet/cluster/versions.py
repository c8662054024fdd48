"""Versions of this package, and of those that decide what a run computes: this process's against the nodes'."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence

from raycontrolnet.cluster.each_node import on_each_node
from raycontrolnet.config.checks import versions
from raycontrolnet.errors import ConfigError, UserError

EQUAL = "raycontrolnet"
"""Package whose version must be equal: its objects travel between the driver and the nodes."""
SAME_RELEASE = ("torch", "diffusers")
"""Packages that decide what a run computes: major and minor version must be equal."""


def check_versions_here(driver: Mapping[str, str]) -> None:
    """Check, on a worker, the versions of its node against the `driver`'s.

    Raises:
        UserError: if they differ.
    """
    if problem := difference(driver, versions(), socket.gethostname()):
        raise UserError(problem)


def check_versions() -> None:
    """Check that the nodes of the connected cluster have this process's versions.

    Raises:
        ConfigError: if a node has others.
    """
    here = versions()
    problems: dict[str, str] = {}
    for node, there in on_each_node(_looker(), (EQUAL, *SAME_RELEASE)):
        if problem := difference(here, there, node):
            problems.setdefault(problem.replace(node, ""), problem)  # one of those alike
    if problems:
        raise ConfigError(list(problems.values()))


def _looker() -> Callable[[Sequence[str]], dict[str, str | None]]:
    def look(names: Sequence[str]) -> dict[str, str | None]:
        """Return package -> version; None if it is not installed."""
        from importlib import import_module, metadata

        found: dict[str, str | None] = dict.fromkeys(names)
        for name in names:
            try:
                # One that Ray has brought along has no metadata.
                found[name] = import_module(name).__version__ if name == names[0] else metadata.version(name)
            except ImportError:
                continue
        return found

    return look


def difference(driver: Mapping[str, str], there: Mapping[str, str | None], node: str) -> str | None:
    """Return how the versions `there`, on `node`, differ from the `driver`'s, and the way out; None if they suit."""
    for name in (EQUAL, *SAME_RELEASE):
        here, other = driver[name], there.get(name)
        if other is not None and _compared(name, here) == _compared(name, other):
            continue
        has = f"has {name} {other}" if other else f"has no {name}"
        bring = "bring it along as examples/train_on_cluster.py does" if name == EQUAL else "name it in a runtime_env"
        return (
            f"{name}: the node {node} {has}, this process has {here}; run pip install {name}=={_public(here)} there, "
            f"or {bring}"
        )
    return None


def _compared(name: str, version: str) -> list[str]:
    return version.split(".") if name == EQUAL else _public(version).split(".")[:2]


def _public(version: str) -> str:
    """Return 2.13.0+cpu without what says for which device it was built."""
    return version.partition("+")[0]
