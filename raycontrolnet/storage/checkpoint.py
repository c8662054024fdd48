"""Checkpoints: whole or not at all.

    checkpoint-N/
        controlnet/            in diffusers' form
        training_state.pt      optimizer, schedule and loss scaler
        manifest.json          written last: what the run was, and every file with its size and SHA-256

A checkpoint is written beside its place and renamed into it: a folder `checkpoint-N` with a manifest whose files have
their sizes is complete. It is sound if their bytes are those that were written, which is checked where a run goes on.
The folders on disk are the only record of checkpoints.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycontrolnet.errors import ConfigError
from raycontrolnet.storage.files import (
    OLD_SUFFIX,
    PARTIAL_SUFFIX,
    readable_by_umask,
    remove_folder,
    replacing_folder,
    save_into,
    sha256_of,
    synced,
)
from raycontrolnet.text import error_message

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST_FILE = "manifest.json"
CONTROLNET_FOLDER = "controlnet"
TRAINING_STATE_FILE = "training_state.pt"

_FACTS: dict[str, type | tuple[type, ...]] = {
    "files": dict,
    "step": int,
    "samples": int,
    "seed": int,
    "run_id": str,
    "written_at": (int, float),
}
"""Entries of every manifest."""
_OF_OTHERS = ("optimizer.bin", "scheduler.bin", "random_states_*.pkl", "optimizer.pt")
"""Files of checkpoints that accelerate writes, as diffusers' scripts do, and transformers' Trainer."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    """Optimizer updates done."""
    samples: int
    """k: samples consumed; a continued run goes on with sample k."""
    seed: int
    run_id: str
    manifest: Mapping[str, Any]

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Return the checkpoint at `path`.

        Raises:
            ValueError: if it is not complete, saying what is missing.
        """
        try:
            manifest = json.loads((path / MANIFEST_FILE).read_text())
        except FileNotFoundError:
            raise ValueError(f"has no {MANIFEST_FILE}, so it was not finished") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"its {MANIFEST_FILE} cannot be read ({error})") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else "unknown"
            raise ValueError(f"its format is {found}, this version reads {FORMAT}")
        if unsaid := sorted(name for name, kind in _FACTS.items() if not isinstance(manifest.get(name), kind)):
            raise ValueError(f"its {MANIFEST_FILE} does not say {', '.join(unsaid)}")
        for name, size in manifest["files"].items():
            file = path / name
            if not file.is_file():
                raise ValueError(f"{name} is missing")
            if file.stat().st_size != size:
                raise ValueError(f"{name} is truncated: {file.stat().st_size} of {size} bytes")
        return Checkpoint(path, manifest["step"], manifest["samples"], manifest["seed"], manifest["run_id"], manifest)

    def check_bytes(self) -> None:
        """Read all files, and compare their bytes with those that were written.

        Raises:
            ValueError: naming the damaged file.
        """
        written = self.manifest.get("sha256", {})  # versions before this one had none
        if not isinstance(written, dict) or not written.keys() <= self.manifest["files"].keys():
            raise ValueError(f"its {MANIFEST_FILE} is damaged")
        for name, digest in sha256_of(self.path, written).items():
            if digest != written[name]:
                raise ValueError(f"{name} is damaged: its bytes are not those that were written")


def name_of(step: int) -> str:
    return f"checkpoint-{step}"


def all_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """Return the complete checkpoints of a run's folder, by step."""
    found = []
    for path in _folders(output_dir):
        with suppress(ValueError):  # unfinished or damaged
            found.append(Checkpoint.open(path))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _folders(output_dir: Path) -> list[Path]:
    """Return everything that has a checkpoint's name, by step."""
    numbered = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(numbered, key=lambda path: int(path.name.partition("-")[2]))


def latest(output_dir: Path, run_id: str | None = None) -> Checkpoint | None:
    """Return the complete checkpoint with most updates; with `run_id`, of those that the run wrote."""
    wanted = [c for c in all_checkpoints(output_dir) if run_id is None or c.run_id == run_id]
    return wanted[-1] if wanted else None


def latest_sound(output_dir: Path, run_id: str | None = None) -> Checkpoint | None:
    """Return the newest checkpoint that is complete and undamaged; with `run_id`, of those that the run wrote.

    Reads its files, and warns of newer ones that are damaged.

    Raises:
        OSError: if the files cannot be read now; another try may find them.
    """
    damaged, found = [], None
    for path in reversed(_folders(output_dir)):
        if not (path / MANIFEST_FILE).exists():  # another program's
            continue
        try:
            checkpoint = Checkpoint.open(path)
            if run_id is not None and checkpoint.run_id != run_id:
                continue
            checkpoint.check_bytes()
        except ValueError as error:
            damaged.append(f"{path}: {error}")
        else:
            found = checkpoint
            break
    for problem in damaged:
        logger.warning("%s%s", problem, f"; {found.path.name} is used instead" if found else "")
    return found


def resolve(resume_from_checkpoint: str | None, output_dir: Path) -> Checkpoint | None:
    """Return the checkpoint that `--resume_from_checkpoint` names: `latest`, a name under `output_dir`, or a path.

    Raises:
        ConfigError: if it is not there, not complete or damaged; or if the setting is not given and `output_dir` holds
            checkpoints, which a new run would mix with.
    """
    present = all_checkpoints(output_dir)
    names = ", ".join(checkpoint.path.name for checkpoint in present) or "none"
    if resume_from_checkpoint is None:
        _check_nothing_is_overwritten(output_dir, present)
        return None
    flag = f"--resume_from_checkpoint={resume_from_checkpoint}"
    if resume_from_checkpoint == "latest":
        try:
            found = latest_sound(output_dir)
        except OSError as error:
            raise ConfigError([f"{flag}: {output_dir} cannot be read ({error_message(error)})"]) from None
        if found:
            return found
        if other := next((path for path in output_dir.glob("checkpoint-*") if _is_of_others(path)), None):
            raise ConfigError([f"{flag}: {_of_others(other)}"])
        if present:
            problem = f"holds only damaged checkpoints ({names}); leave the flag out, and name another --output_dir"
        else:
            problem = "holds no complete checkpoint; leave the flag out to start anew"
        raise ConfigError([f"{flag}: {output_dir} {problem}"])
    path = Path(resume_from_checkpoint)
    if not path.is_absolute() and (output_dir / path.name).is_dir() and path.name == str(path):
        path = output_dir / path
    if not path.is_dir():
        raise ConfigError([f"{flag}: no such folder; complete in {output_dir}: {names}"])
    if _is_of_others(path):
        raise ConfigError([f"{flag}: {_of_others(path)}"])
    try:
        checkpoint = Checkpoint.open(path.resolve())
        checkpoint.check_bytes()
    except (ValueError, OSError) as error:
        others = ", ".join(each.path.name for each in present if each.path.resolve() != path.resolve()) or "none"
        raise ConfigError([f"{flag}: {error}; complete in {output_dir}: {others}"]) from None
    return checkpoint


def _check_nothing_is_overwritten(output_dir: Path, present: Sequence[Checkpoint]) -> None:
    # Of another program, such as diffusers' script, or damaged: not to be overwritten either.
    others = [*output_dir.glob("checkpoint-[0-9]*"), *output_dir.glob("diffusion_pytorch_model.safetensors")]
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
    raise ConfigError([f"--output_dir={output_dir}: {problem}"])


def _is_of_others(path: Path) -> bool:
    return not (path / MANIFEST_FILE).exists() and any(any(path.glob(pattern)) for pattern in _OF_OTHERS)


def _of_others(path: Path) -> str:
    weights = next((each for each in (path / CONTROLNET_FOLDER, path) if (each / "config.json").exists()), None)
    train_on = f": add --controlnet_model_name_or_path {weights}" if weights else ""
    return (
        f"{path.name} was written by another program, such as diffusers' script, and its optimizer cannot be read; "
        f"train its weights on in another --output_dir{train_on}"
    )


def write(
    output_dir: Path,
    *,
    step: int,
    samples: int,
    seed: int,
    run_id: str,
    save: Callable[[Path], None],
    facts: Mapping[str, Any],
) -> Checkpoint:
    """Write `checkpoint-<step>`.

    Args:
        save: writes the files into the folder it is given.
        facts: added to the manifest: settings, data, versions; no secrets.
    """
    final = output_dir / name_of(step)
    with replacing_folder(final) as partial:  # replaces one of an earlier run that went further, or a damaged one
        save_into(partial, save)
        readable_by_umask(partial)
        files = sorted(file for file in partial.rglob("*") if file.is_file())
        for file in files:
            synced(file)
        manifest = {
            "format": FORMAT,
            "step": step,
            "samples": samples,
            "seed": seed,
            "run_id": run_id,
            "written_at": max([time.time(), *(_written_at(former) + 1e-3 for former in all_checkpoints(output_dir))]),
            "files": {file.relative_to(partial).as_posix(): file.stat().st_size for file in files},
            "sha256": sha256_of(partial, [file.relative_to(partial).as_posix() for file in files]),
            **facts,
        }
        (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1) + "\n")
        synced(partial / MANIFEST_FILE)
    return Checkpoint.open(final)


def prune(output_dir: Path, limit: int | None) -> None:
    """Delete all but the `limit` checkpoints written last. Call it only when the newest is complete."""
    if limit is None:
        return
    by_age = sorted(all_checkpoints(output_dir), key=_written_at)
    for checkpoint in by_age[:-limit]:
        remove_folder(checkpoint.path)


def _written_at(checkpoint: Checkpoint) -> float:
    """Return Unix seconds; later than those of earlier checkpoints even if the clock was put back."""
    return float(checkpoint.manifest["written_at"])


def remove_leftovers(output_dir: Path) -> None:
    """Delete what interrupted writes and deletions left; a complete checkpoint that is missing is put back."""
    for suffix in (PARTIAL_SUFFIX, OLD_SUFFIX):
        for path in output_dir.glob(f".checkpoint-*{suffix}"):
            final = output_dir / path.name[1:].removesuffix(suffix)
            with suppress(ValueError):
                if not final.exists():
                    Checkpoint.open(path)
                    path.rename(final)
                    continue
            shutil.rmtree(path, ignore_errors=True)
