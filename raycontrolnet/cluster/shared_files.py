"""Files that the nodes must see as the driver does: data, models, latents."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from raycontrolnet.cluster.each_node import has_cpus, on_each_node
from raycontrolnet.cluster.nodes import Node
from raycontrolnet.errors import ConfigError, UserError

APPEARS_WITHIN_S = 5.0
"""Time that a network file system may take to show a node what was just written."""
SHOWN_NODES = 3


@dataclass(frozen=True)
class SharedFiles:
    """Files of a setting that the driver sees."""

    setting: str
    """--NAME=VALUE."""
    paths: tuple[str, ...]
    """Absolute paths."""

    @staticmethod
    def of(setting: str, paths: Iterable[str]) -> SharedFiles:
        """Return those of `paths` that are there now."""
        return SharedFiles(setting, tuple(path for path in dict.fromkeys(paths) if Path(path).exists()))

    def check_here(self) -> None:
        """Check, on a node that may have joined late, that it sees the files; once in a process.

        Raises:
            UserError: if it does not.
        """
        if self not in _seen_here:
            if missing := _looker()(self.paths, APPEARS_WITHIN_S):
                raise UserError(self.problem(missing, [socket.gethostname()]))
            _seen_here.add(self)

    def problem(self, missing: str, nodes: Sequence[str]) -> str:
        """Return what to tell users of `nodes` that do not see the path `missing`."""
        names = ", ".join(nodes[:SHOWN_NODES]) + (", ..." if len(nodes) > SHOWN_NODES else "")
        who = f"the node {names} does" if len(nodes) == 1 else f"the nodes {names} do"
        return f"{self.setting}: {who} not see {missing}; name a folder on storage that all nodes share"


_seen_here: set[SharedFiles] = set()


def check_nodes_see(files: Iterable[SharedFiles], of: Callable[[Node], bool] = has_cpus) -> None:
    """Check that the nodes of the connected cluster see `files`.

    Args:
        of: chooses nodes by their resources.

    Raises:
        ConfigError: if some do not.
    """
    problems = []
    for shared in files:
        answers = on_each_node(_looker(), shared.paths, APPEARS_WITHIN_S, of=of, here=False) if shared.paths else []
        if blind := [(node, missing) for node, missing in answers if missing]:
            problems.append(shared.problem(blind[0][1], [node for node, _ in blind]))
    if problems:
        raise ConfigError(problems)


def _looker() -> Callable[[Sequence[str], float], str | None]:
    def look(paths: Sequence[str], patience_s: float) -> str | None:
        """Return the first of `paths` that is not there; it may appear for `patience_s`."""
        import os
        import time

        end = time.monotonic() + patience_s
        while (missing := next((path for path in paths if not os.path.exists(path)), None)) is not None:  # noqa: PTH110
            if time.monotonic() > end:
                return missing
            time.sleep(0.5)
        return None

    return look
