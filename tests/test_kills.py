"""`kill -9` at every moment of a run in one process: the same command, resumed, does what it would have done unhurt."""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import kill_9
from runs import Settings, column, contents, equal, run, weights

from raycontrolnet import TrainConfig, fit
from raycontrolnet.latents import manifest
from raycontrolnet.storage.checkpoint import all_checkpoints
from raycontrolnet.training import held_out
from raycontrolnet.training.status import read_status

MOMENTS = {
    "the lock is taken": ("storage.folder_lock:reopen_folder", 1),
    "the first shard is stored": ("latents.shards:EncodeJob.store", 1),
    "the cache's manifest is written": ("latents.manifest:Manifest.write", 1),
    "run.json is written": ("training.status:RunStatus.write", 1),
    "the folder is marked": ("launch.running:mark_folder", 1),
    "models are read": ("train_controlnet:build_state", 1),
    "an update is done": ("train_controlnet:train_step", 1),
    "held-out rows are measured": ("training.held_out:_metrics", 1),
    "a measurement is logged": ("training.metrics:MetricsLog.append", 3),
    "a checkpoint's files are written": ("training.saver:write_parts", 1),
    "the first checkpoint is whole": ("storage.checkpoint:write", 1),
    "an image is drawn": ("sampling.images:write", 1),
    "a validation is finished": ("sampling.images:finish", 1),
    "an update after the first checkpoint is done": ("train_controlnet:train_step", 3),
    "the second checkpoint's files are written": ("training.saver:write_parts", 2),
    "the second checkpoint is whole": ("storage.checkpoint:write", 2),
    "the old checkpoint is set aside": ("storage.checkpoint:remove_folder", 1),
    "final weights are written": ("training.final_weights:write_weights", 1),
    "final weights are in place": ("train_controlnet:save_final_weights", 1),
    "the last validation is finished": ("sampling.images:finish", 2),
    "the run's marks are removed": ("launch.running:remove_marks", 1),
    "the model card is written": ("launch.fit:_write_card", 1),
    "the last report is written": ("report.live_report:_write", 1),
}
"""Moment -> the function that has just returned, and its how many-eth call that was."""
ALWAYS = {
    "the cache's manifest is written", "a checkpoint's files are written", "the first checkpoint is whole",
    "an image is drawn", "the old checkpoint is set aside", "final weights are in place",
}  # fmt: skip
"""Moments that are not slow: one of each kind."""
SHARD_ROWS = 6
"""So that the tiny cache has several shards."""


def killed_run(settings: Settings, place: str, call: int) -> None:
    """Train, and be killed once the function at `place` has returned for the `call`-th time."""
    module_name, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, import_module(f"raycontrolnet.{module_name}"))
    original, calls = getattr(owner, name), []

    @functools.wraps(original)
    def then_killed(*args: Any, **how: Any) -> Any:
        result = original(*args, **how)
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, then_killed)
    small_shards(pytest.MonkeyPatch())
    fit(TrainConfig(**settings), stream=io.StringIO())


def small_shards(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(manifest, "SHARD_ROWS", SHARD_ROWS)


@pytest.fixture(scope="module")
def settings(validated_settings: Settings) -> Settings:
    return validated_settings | {
        "cache_latents": "on",
        "validation_split": 3,
        "checkpoints_total_limit": 1,
        "use_ema": True,
        "num_validation_images": 1,
    }


@pytest.fixture(scope="module")
def whole(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch)
        return run(settings, folder / "run", latents_cache_dir=str(folder / "cache"))


@pytest.mark.parametrize(
    "moment", [each if each in ALWAYS else pytest.param(each, marks=pytest.mark.slow) for each in MOMENTS]
)
def test_killed_once(moment: str, settings: Settings, whole: Path, tmp_path: Path) -> None:
    settings = settings | {"output_dir": str(tmp_path / "run"), "latents_cache_dir": str(tmp_path / "cache")}
    kill_at(moment, settings)
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch)
        out = run(settings, tmp_path / "run", resume_from_checkpoint="latest")
    check_is_whole(out, whole)
    assert contents(tmp_path / "cache").keys() == contents(whole.parent / "cache").keys()


def kill_at(moment: str, settings: Settings) -> None:
    """Train in a process that is killed at the moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["raycontrolnet.launch.fit", "raycontrolnet.train_controlnet", "test_kills"])
    process = context.Process(target=killed_run, args=(settings, *MOMENTS[moment]))
    process.start()
    process.join(200)
    assert process.exitcode == -signal.SIGKILL, "the moment has not come"


def test_images_that_kill_are_made_up_once(
    settings: Settings, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a run whose images fill the memory would make no update any more."""
    settings = settings | {"output_dir": str(tmp_path / "run"), "latents_cache_dir": str(tmp_path / "cache")}
    kill_at("the first checkpoint is whole", settings)
    settings |= {"resume_from_checkpoint": "latest"}
    small_shards(monkeypatch)
    kill_at("an image is drawn", settings)
    out = run(settings, tmp_path / "run")
    assert column(out, "loss") == column(whole, "loss")
    assert [path.parent.name for path in out.glob("validation/*/metadata.jsonl")] == ["step-000004"]
    assert "step 2: no validation images; an earlier attempt" in (out / "run.log").read_text()


ON_RAY = {
    "latents are encoded": "cache/*.arrow",
    "workers are starting": "cache/manifest.json",
    "validation images are drawn": "run/validation/step-*/*.png",
    "the final weights are there": "run/config.json",
}
"""Moment -> a file that is there from then on."""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ON_RAY)
def test_driver_and_ray_killed_once(moment: str, settings: Settings, whole: Path, tmp_path: Path) -> None:
    """With workers on a Ray of its own, all of which is killed; figures are those of another number of threads."""
    settings = settings | {"output_dir": str(tmp_path / "run"), "latents_cache_dir": str(tmp_path / "cache")}
    settings |= {"num_workers": "1"}
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
    command = [sys.executable, "-m", "raycontrolnet", "train", "--config", str(file)]
    kill_9(command, lambda: [*tmp_path.glob(ON_RAY[moment])])
    out = run(settings, tmp_path / "run", num_workers="0", resume_from_checkpoint="latest")
    check_is_whole(out, whole, tolerance=1e-4)


def check_is_whole(out: Path, whole: Path, tolerance: float = 0.0) -> None:
    """Check that a run has left what the other has: figures, weights and images alike, and no other files."""
    assert column(out, "loss") == pytest.approx(column(whole, "loss"), tolerance, 0.0)
    measured, expected_measured = (held_out.read(folder) for folder in (out, whole))
    expected_losses = [line["val_loss"] for line in expected_measured]
    assert [line["val_loss"] for line in measured] == pytest.approx(expected_losses, tolerance, 0.0)
    left, expected = contents(out), contents(whole)
    names = [{name for name in files if not name.startswith("logs/")} for files in (left, expected)]
    assert names[0] == names[1]
    images = [name for name in expected if name.endswith(".png")]
    assert images
    if not tolerance:
        assert equal(weights(out), weights(whole))
        assert {name: left[name] for name in images} == {name: expected[name] for name in images}
    assert [each.step for each in all_checkpoints(out)] == [4]
    assert read_status(out)["status"] == "finished"
