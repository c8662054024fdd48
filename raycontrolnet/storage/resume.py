"""The checkpoint that a run goes on from, as `--resume_from_checkpoint` names it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from raycontrolnet.errors import ConfigError
from raycontrolnet.storage.checkpoint import CONTROLNET_FOLDER, MANIFEST_FILE, Checkpoint, all_checkpoints
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.storage.stored_folder import DRIVER, StoredFolder, folder_containing
from raycontrolnet.storage.uri import is_uri, shown_uri, unusable
from raycontrolnet.text import error_message

SWEEP_FILE = "sweep.json"
"""The file by which the folder of a sweep is known."""
_OF_OTHERS = ("optimizer.bin", "scheduler.bin", "random_states_*.pkl", "optimizer.pt")
"""Files of checkpoints that accelerate writes, as diffusers' scripts do, and transformers' Trainer."""


def resolve(resume_from_checkpoint: str | None, folder: RunFolder) -> Checkpoint | None:
    """Return the checkpoint that `--resume_from_checkpoint` names: `latest`, a name in `folder`, a path, or a URI.

    It is on this machine then. None for a new run, which is what `latest` means before the first checkpoint: the same
    command then starts a run, and goes on with it wherever it was cut off.

    Raises:
        ConfigError: if it is not there, not complete or damaged; or if the setting is not given and `folder` holds
            checkpoints, which a new run would mix with; or if an object store cannot be read.
    """
    try:
        present = folder.checkpoints()
    except OSError as error:
        raise ConfigError([f"--output_dir={folder.shown}: {unusable(error)}"]) from None
    if resume_from_checkpoint is None:
        _check_nothing_is_overwritten(folder, present)
        return None
    flag = f"--resume_from_checkpoint={shown_uri(resume_from_checkpoint)}"
    if resume_from_checkpoint == "latest":
        return _latest(folder, present, flag)
    path = Path(resume_from_checkpoint)
    found = next((each for each in present if each.path.name == str(path)), None)
    if is_uri(resume_from_checkpoint):
        found = _at_uri(resume_from_checkpoint, folder, present, flag)
    elif found:
        path = found.path
    else:
        path = _other_folder(path, folder, present, flag)
    try:
        return folder.sound(found or Checkpoint.open(path.resolve()))
    except (ValueError, OSError) as error:
        others = _names([each for each in present if each.path.resolve() != path.resolve()])
        raise ConfigError([f"{flag}: {error}; complete in {folder.shown}: {others}"]) from None


def _at_uri(uri: str, folder: RunFolder, present: Sequence[Checkpoint], flag: str) -> Checkpoint:
    """Return the complete checkpoint that a URI names."""
    problem = "must be a name in --output_dir, such as checkpoint-500, or a folder on a disk"
    if folder.is_stored:
        problem = "no such folder"
        try:
            if found := checkpoint_at(uri, folder):
                return found
        except OSError as error:
            raise ConfigError([f"{flag}: {unusable(error)}"]) from None
    raise ConfigError([f"{flag}: {problem}; complete in {folder.shown}: {_names(present)}"])


def _other_folder(path: Path, folder: RunFolder, present: Sequence[Checkpoint], flag: str) -> Path:
    """Return the folder on this machine that is no complete checkpoint of `folder`: a damaged one, or another run's."""
    is_name = path.name == str(path)
    if is_name and not folder.is_stored and (folder.path / path).is_dir():
        path = folder.path / path
    if not path.is_dir():
        anew = "" if present else "; leave the flag out for a new run"
        raise ConfigError([f"{flag}: no such folder; complete in {folder.shown}: {_names(present)}{anew}"])
    if _is_of_others(path):
        raise ConfigError([f"{flag}: {_of_others(path)}"])
    return path


def checkpoint_at(place: str, folder: RunFolder) -> Checkpoint | None:
    """Return the complete checkpoint that a path or URI names, of `folder` or of another run; None if it is gone.

    Raises:
        OSError: an object store cannot be read.
    """
    if not is_uri(place):
        return next((each for each in all_checkpoints(Path(place).parent) if each.path == Path(place)), None)
    if own := next((each for each in folder.checkpoints() if folder.place_of(each) == place), None):
        return own
    other, _ = folder_containing(place, DRIVER)
    found = next((each for each in other.checkpoints() if other.place_of(each) == place), None)
    return found and replace(found, uri=place)


def _latest(folder: RunFolder, present: Sequence[Checkpoint], flag: str) -> Checkpoint | None:
    try:
        found = folder.latest_sound()
    except OSError as error:
        raise ConfigError([f"{flag}: {folder.shown} cannot be read ({error_message(error)})"]) from None
    if found:
        return found
    if other := next((path for path in folder.path.glob("checkpoint-*") if _is_of_others(path)), None):
        raise ConfigError([f"{flag}: {_of_others(other)}"])
    if present:
        problem = f"holds only damaged checkpoints ({_names(present)})"
        raise ConfigError([f"{flag}: {folder.shown} {problem}; leave the flag out, and name another --output_dir"])
    _check_nothing_is_overwritten(folder, present)
    return None


def _names(checkpoints: Sequence[Checkpoint]) -> str:
    return ", ".join(checkpoint.path.name for checkpoint in checkpoints) or "none"


def check_holds_no_sweep(folder: RunFolder) -> None:
    """Check that a run would not write over a sweep's report and logs.

    Raises:
        ConfigError: if it would, or if an object store cannot be read.
    """
    try:
        if isinstance(folder, StoredFolder):
            is_there = bool(folder.store.find([SWEEP_FILE]))
        else:
            is_there = (folder.path / SWEEP_FILE).exists()
    except OSError as error:
        raise ConfigError([f"--output_dir={folder.shown}: {unusable(error)}"]) from None
    if is_there:
        problem = "holds a sweep, which `raycontrolnet tune --resume` goes on with; name another --output_dir for a run"
        raise ConfigError([f"--output_dir={folder.shown}: {problem}"])


def _check_nothing_is_overwritten(folder: RunFolder, present: Sequence[Checkpoint]) -> None:
    # Of another program, such as diffusers' script, or damaged: not to be overwritten either.
    patterns = () if folder.is_stored else ("checkpoint-[0-9]*", "diffusion_pytorch_model.safetensors")
    others = [path for pattern in patterns for path in folder.path.glob(pattern)]
    if present:
        problem = (
            f"holds {present[-1].path.name} of an earlier run. Go on with it: add --resume_from_checkpoint latest. "
            "Start anew: name another --output_dir, or delete that folder"
        )
    elif others and _is_of_others(others[0]):
        problem = _of_others(others[0])
    elif others:
        problem = (
            f"holds {others[0].name}, which is no complete checkpoint of raycontrolnet and would be overwritten; name "
            "another --output_dir"
        )
    else:
        return
    raise ConfigError([f"--output_dir={folder.shown}: {problem}"])


def _is_of_others(path: Path) -> bool:
    return not (path / MANIFEST_FILE).exists() and any(any(path.glob(pattern)) for pattern in _OF_OTHERS)


def _of_others(path: Path) -> str:
    weights = next((each for each in (path / CONTROLNET_FOLDER, path) if (each / "config.json").exists()), None)
    train_on = f": add --controlnet_model_name_or_path {weights}" if weights else ""
    return (
        f"{path.name} was written by another program, such as diffusers' script, and its optimizer cannot be read; "
        f"train its weights on in another --output_dir{train_on}"
    )
