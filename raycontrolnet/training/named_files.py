"""The one file of `--save_name`, through the runs that share a folder: each must find which files are its to replace.

A run replaces the file of an earlier one, also of another name, as it replaces the weights beside it, but only as a run
left it. Size and time of its own it notes in `NAMED_FILES` before the file is there, so that after a kill it is known.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raycontrolnet.config.output_settings import SAFETENSORS, OutputConfig, save_name_problem
from raycontrolnet.errors import ConfigError
from raycontrolnet.storage.files import read_json, replace_text
from raycontrolnet.storage.run_folder import RunFolder

logger = logging.getLogger(__name__)

NAMED_FILES = ".named_files.json"
"""Record of the files that runs wrote for their `--save_name`: name -> the states that may be theirs.

A state is size and time. The time is 0 if it is not known: before a file is in an object store, or if that has none.
"""

State = list[int]


def check_named_file(output: OutputConfig, folder: RunFolder) -> None:
    """Check that the run overwrites no file of the user's; warn of those of earlier runs that it will delete.

    Raises:
        ConfigError: it would.
    """
    name = output.single_file
    try:
        left = _as_left(folder)
        is_foreign = name is not None and name not in left and folder.state_of(name) is not None
    except OSError:  # a store that cannot be read, which looking for checkpoints tells
        return
    if is_foreign:
        problem = f"{folder.shown} holds {name}, which no run wrote or which was changed since, and this one would"
        raise ConfigError([f"--save_name={output.save_name}: {problem} overwrite; move it, or take another name"])
    for other in _formers(left, name):
        logger.warning(
            "%s/%s is of an earlier --save_name, and is deleted once there are newer weights: move it to keep it",
            folder.shown, other,
        )  # fmt: skip


def begin_named_file(folder: RunFolder, name: str | None, written: Path) -> None:
    """Note the file `name`, which is whole in the folder `written` and is moved to the run's folder next."""
    if name is None:
        return
    left, found = _as_left(folder), (written / name).stat()
    coming = [found.st_size, 0 if folder.is_stored else found.st_mtime_ns]
    states = {other: [state] for other, state in left.items()}
    _write(folder, states | {name: [*states.get(name, []), coming]})


def end_named_file(folder: RunFolder, name: str | None) -> None:
    """Delete what earlier runs wrote under other names, now that newer weights are there; note the file `name`.

    A file that somebody has changed since stays, and so does one whose time is not known.
    """
    left = _as_left(folder)
    if not left and name is None:
        folder.delete(NAMED_FILES)
        return
    formers = _formers(left, name)
    for other in formers:
        folder.delete(other)
        logger.info("deleted %s, the weights of an earlier --save_name", other)
    states = {other: [state] for other, state in left.items() if other not in formers}
    if name and (state := folder.state_of(name)):
        states[name] = [state]
    _write(folder, states)


def _formers(left: Mapping[str, State], name: str | None) -> list[str]:
    """Return the files of earlier runs under other names than `name` that are surely theirs."""
    return [other for other, (_, time) in left.items() if other != name and time]


def _as_left(folder: RunFolder) -> dict[str, State]:
    """Return the files that are as runs left them: name -> noted state."""
    found: dict[str, State] = {}
    for name, states in _read(folder).items():
        if now := folder.state_of(name):
            found |= [(name, [size, time]) for size, time in states if size == now[0] and time in (0, now[1])]
    return found


def _read(folder: RunFolder) -> dict[str, list[State]]:
    """Return the record, without what no run writes: a file that is in the user's reach decides what is deleted."""
    folder.pull(NAMED_FILES)
    noted = read_json(folder.path / NAMED_FILES)
    return {name: states for name, states in noted.items() if _is_name(name) and _are_states(states)}


def _is_name(name: str) -> bool:
    return name.endswith(SAFETENSORS) and not save_name_problem(name.removesuffix(SAFETENSORS))


def _are_states(states: Any) -> bool:
    return isinstance(states, list) and all(
        isinstance(state, list) and [type(part) for part in state] == [int, int] for state in states
    )


def _write(folder: RunFolder, states: Mapping[str, list[State]]) -> None:
    if not states:
        folder.delete(NAMED_FILES)
        return
    replace_text(folder.path / NAMED_FILES, json.dumps(states) + "\n")
    folder.push(NAMED_FILES)
