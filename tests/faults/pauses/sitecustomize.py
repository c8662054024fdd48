"""Pauses in the program's processes, at the moment that a fault is planned for.

Python imports this file in every process whose PYTHONPATH has its folder: driver, workers, loading tasks. A process
that comes to the moment of `$FAULTS_FOLDER/plan.json` writes its id to the file `here`, and waits for the file `go`.
The file `done` has the number of updates until then.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(os.environ.get("FAULTS_FOLDER", "/nonexistent"))
MOST_S = 120.0
"""A pause ends then in any case."""


def plan() -> dict[str, Any]:
    """Return the plan; empty if there is none."""
    try:
        found = json.loads((FOLDER / "plan.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return dict(found)


def reached(place: str, detail: object) -> bool:
    """Check that this is the planned moment, and that no other process has come to it before."""
    wanted = plan()
    if (wanted.get("place"), wanted.get("detail")) != (place, str(detail)):
        return False
    mine = FOLDER / f"here-{os.getpid()}"
    mine.write_text(str(os.getpid()))
    try:
        os.link(mine, FOLDER / "here")
    except FileExistsError:
        return False
    return True


def wait() -> None:
    end = time.monotonic() + MOST_S
    while not (FOLDER / "go").exists() and time.monotonic() < end:
        time.sleep(0.02)


def pause(place: str, detail: object) -> None:
    if reached(place, detail):
        wait()


def before(owner: Any, name: str, moment: Callable[..., None]) -> None:
    """Let `moment` be called before every call of `owner.name`, with the same arguments."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        moment(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def checkpoint_of(folder: Path) -> str:
    """Return checkpoint-N of the name of an unfinished folder."""
    return folder.name.removeprefix(".").partition(".")[0]


def in_worker_loop(module: ModuleType) -> None:
    original = module.Worker.update

    def update(self: Any, inputs: Any) -> None:
        original(self, inputs)
        if self.share.rank == 0:
            if not (FOLDER / "here").exists():
                (FOLDER / "done").write_text(str(self.state.step))
            pause("update", self.state.step)

    module.Worker.update = update


def in_state(module: ModuleType) -> None:
    original = module.torch.save

    def save(content: Any, file: Any) -> None:
        if not isinstance(file, Path) or file.name != module.TRAINING_STATE_FILE:
            original(content, file)
            return
        name = checkpoint_of(file.parent)
        pause("write", f"{name} without training_state.pt")
        original(content, file)
        if reached("write", f"{name} with half of training_state.pt"):
            os.truncate(file, file.stat().st_size // 2)
            wait()
            original(content, file)

    module.torch.save = save


def in_final_weights(module: ModuleType) -> None:
    original = module.os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(source).parent.name == ".final.partial":
            pause("final", Path(target).name)
        original(source, target)

    module.os.replace = replace


def in_checkpoint(module: ModuleType) -> None:
    before(module, "save_into", lambda folder, _: pause("write", f"{checkpoint_of(folder)} without files"))

    def without_manifest(folder: Path, _: object) -> None:
        if folder.name.endswith(module.PARTIAL_SUFFIX):
            pause("manifest", checkpoint_of(folder))

    before(module, "sha256_of", without_manifest)
    before(module, "remove_folder", lambda path: pause("prune", f"{path.name} whole"))


def in_files(module: ModuleType) -> None:
    def half_deleted(path: object, *_: object, **__: object) -> None:
        if not isinstance(path, Path) or not path.name.endswith(module.OLD_SUFFIX) or not path.exists():
            return
        if reached("prune", f"{checkpoint_of(path)} half deleted"):
            (path / "training_state.pt").unlink()
            wait()

    before(module.shutil, "rmtree", half_deleted)


def in_shards(module: ModuleType) -> None:
    from raycontrolnet.latents.manifest import SHARD_ROWS

    def shard(rows: Sequence[int]) -> int:
        return rows[0] // SHARD_ROWS

    def encodes(_: object, loaded: Any, __: object) -> None:
        if rows := getattr(loaded, "rows", None):
            pause("encode", shard([row.row for row in rows]))

    before(module.EncodeJob, "load", lambda _, found: pause("load", shard(found.rows)))
    before(module.EncodeJob, "encode", encodes)


def in_stream(module: ModuleType) -> None:
    def holds(_: object, first_sample: int) -> None:
        held_from = plan().get("held_from")
        if held_from is not None and first_sample >= held_from and not (FOLDER / "go").exists():
            (FOLDER / f"loading-{os.getpid()}").touch()
            wait()

    before(module.BatchLoader, "batch", holds)
    module.MOST_IN_BUNDLE = 1  # type: ignore[attr-defined]  # as for large images, so that loading is not done at once


def in_store(module: ModuleType) -> None:
    before(module.ObjectStore, "upload", lambda _, __, name, *___: pause("upload", name))
    before(module.ObjectStore, "delete_folder", lambda _, name: pause("delete", name))


def in_hub(module: ModuleType) -> None:
    for name in ("create_repo", "create_commit"):
        before(module.HfApi, name, lambda *_, name=name, **__: pause("push", name))


PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "raycontrolnet.train_controlnet": in_worker_loop,
    "raycontrolnet.training.state": in_state,
    "raycontrolnet.training.final_weights": in_final_weights,
    "raycontrolnet.storage.checkpoint": in_checkpoint,
    "raycontrolnet.storage.files": in_files,
    "raycontrolnet.storage.object_store": in_store,
    "raycontrolnet.latents.shards": in_shards,
    "raycontrolnet.data.stream": in_stream,
    "huggingface_hub.hf_api": in_hub,
}
"""Module -> what is changed in it."""


class Patching(importlib.abc.MetaPathFinder):
    """A finder of the modules of `PATCHES`, which changes them once they are there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if (patch := PATCHES.get(fullname)) is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        original = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            original(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if FOLDER.is_dir():
    sys.meta_path.insert(0, Patching())
