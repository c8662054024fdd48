"""The one file of `--save_name`, through the runs that share a folder: each must find which files are its to replace.

A run replaces the file of an earlier one, also of another name, as it replaces the weights beside it. What it has
written it notes in `NAMED_FILES`, first by name, so that nothing of its own is taken for a user's after a kill.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from raycontrolnet.config.output_settings import OutputConfig
from raycontrolnet.storage.files import read_json, replacing
from raycontrolnet.storage.run_folder import RunFolder

logger = logging.getLogger(__name__)

NAMED_FILES = ".named_files.json"
"""Record of the files that runs wrote for their `--save_name`: name -> size and time, null until it is whole."""


def named_file_problems(output: OutputConfig, folder: RunFolder) -> Iterator[str]:
    """Yield a problem if the run would overwrite a file that no run wrote; warn of one that it will delete."""
    name = output.single_file
    try:
        known = _read(folder)
        if name and name not in known and folder.state_of(name) is not None:
            yield (
                f"--save_name={output.save_name}: {folder.shown} holds {name}, which no run wrote and this one would "
                "overwrite; move it, or take another name"
            )
        for other in _formers(folder, known, name):
            logger.warning(
                "%s/%s is of an earlier --save_name, and is deleted once there are newer weights: move it to keep it",
                folder.shown, other,
            )  # fmt: skip
    except OSError:  # a store that cannot be read, which looking for checkpoints tells
        return


def begin_named_file(folder: RunFolder, name: str | None) -> None:
    """Delete what earlier runs wrote under other names, before newer weights stand beside it; note `name`.

    A file that somebody has changed since stays.
    """
    known = _read(folder)
    for other in _formers(folder, known, name):
        folder.delete(other)
        logger.info("deleted %s, the weights of an earlier --save_name", other)
    if known or name:
        _write(folder, {name: known.get(name)} if name else {})


def end_named_file(folder: RunFolder, name: str | None) -> None:
    """Note that the file `name` is there, whole."""
    if name:
        _write(folder, {name: folder.state_of(name)})


def _formers(folder: RunFolder, known: Mapping[str, Any], name: str | None) -> list[str]:
    """Return the files of earlier runs under other names than `name` that are as those left them."""
    return [other for other, state in known.items() if other != name and state and folder.state_of(other) == state]


def _read(folder: RunFolder) -> dict[str, Any]:
    folder.pull(NAMED_FILES)
    return read_json(folder.path / NAMED_FILES)


def _write(folder: RunFolder, known: Mapping[str, Any]) -> None:
    if not known:
        folder.delete(NAMED_FILES)
        return
    with replacing(folder.path / NAMED_FILES) as partial:
        partial.write_text(json.dumps(known) + "\n")
    folder.push(NAMED_FILES)
