"""The one file of `--save_name` in a folder that runs share: what they replace and delete, and what is the user's."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import WEIGHTS, Settings, contents, equal, train, weights
from s3_server import BUCKET, S3Server, elsewhere, s3, use_s3
from safetensors.torch import load_file

from raycontrolnet import SweepConfig, TrainConfig
from raycontrolnet.errors import ConfigError
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.storage.stored_folder import StoredFolder
from raycontrolnet.training import final_weights
from raycontrolnet.training.final_weights import save_final_weights
from raycontrolnet.training.named_files import NAMED_FILES, check_named_file, end_named_file
from raycontrolnet.tune.plan import plan_sweep

__all__ = ["elsewhere", "s3", "use_s3"]  # fixtures

FOREIGN = "which no run wrote or which was changed since"


def named_files(folder: Path) -> list[str]:
    """Return the names of all files with weights beside diffusers' own."""
    return sorted(path.name for path in folder.glob("*.safetensors") if path.name != WEIGHTS)


class NoRun:
    """Stand-in for runs: the check and the saving in a folder, without training; each has other weights."""

    def __init__(self, folder: Callable[[], RunFolder], monkeypatch: pytest.MonkeyPatch):
        self._folder, self._patch = folder, monkeypatch
        monkeypatch.setattr(final_weights, "unwrap_controlnet", lambda _: torch.nn.Linear(4, 4))
        monkeypatch.setattr(final_weights, "save_controlnet_config", write_config)

    def __call__(self, name: str | None) -> None:
        """Check and save, as a run to the `save_name`."""
        config, folder = (
            TrainConfig(pretrained_model_name_or_path="b", train_data_dir="d", save_name=name),
            self._folder(),
        )
        check_named_file(config, folder)
        state: Any = SimpleNamespace(
            components=SimpleNamespace(noise_scheduler=SimpleNamespace(config={})), averages=None
        )
        save_final_weights(state, config, folder)

    def killed_at(self, moment: str, name: str) -> None:
        """End as by a signal, before the files are moved or once they are there."""
        with self._patch.context() as patch:
            if moment == "the move":
                patch.setattr(final_weights, "os", SimpleNamespace(replace=killed))
            else:
                patch.setattr(final_weights, "end_named_file", killed)
            with pytest.raises(KeyboardInterrupt):
                self(name)


def write_config(_: object, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"cross_attention_dim": 4}')


def killed(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NoRun:
    return NoRun(lambda: RunFolder(str(tmp_path)), monkeypatch)


def test_under_another_name(run_settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file of an earlier state goes when newer weights come; copies, and changed ones, are the user's."""
    out = tmp_path / "run"

    def run(steps: int, name: str | None, **changed: Any) -> list[str]:
        settings = run_settings | {"max_train_steps": steps, "save_name": name, "output_dir": str(out)}
        train(settings | {"resume_from_checkpoint": "latest"} | changed)
        return named_files(out)

    assert run(1, "first") == ["first.safetensors"]
    shutil.copy2(out / "first.safetensors", out / "copy.safetensors")
    assert run(2, "first") == ["copy.safetensors", "first.safetensors"]
    assert equal(load_file(out / "first.safetensors"), weights(out))
    assert "earlier --save_name" not in caplog.text
    assert run(3, "second") == ["copy.safetensors", "second.safetensors"]
    assert f"{out}/first.safetensors is of an earlier --save_name, and is deleted once there are" in caplog.text
    assert not equal(load_file(out / "copy.safetensors"), weights(out))
    shutil.copy2(out / "second.safetensors", out / "second.before")
    (out / "second.safetensors").write_bytes(b"mine")
    assert run(4, "third") == ["copy.safetensors", "second.safetensors", "third.safetensors"]
    for left in out.glob("checkpoint-*"):
        shutil.rmtree(left)
    (out / WEIGHTS).unlink()  # to start anew
    assert run(1, None, resume_from_checkpoint=None) == ["copy.safetensors", "second.safetensors"]
    assert not (out / NAMED_FILES).exists()
    before = contents(out)
    for name in ("copy", "second"):
        with pytest.raises(ConfigError, match=rf"^--save_name={name}: .*, {FOREIGN}, and this one would overw"):
            run(2, name)
    assert {name: before[name] for name in ("copy.safetensors", "second.safetensors", WEIGHTS)}.items() <= (
        contents(out).items()
    )


def test_a_changed_file_is_not_overwritten(save: NoRun, tmp_path: Path) -> None:
    """Neither one with other content, nor one that was only saved again, nor an empty one; also after another run."""
    save("edges")
    file = tmp_path / "edges.safetensors"
    for content in (b"mine", file.read_bytes(), b""):
        file.write_bytes(content)
        os.utime(file, ns=(1, 1))
        with pytest.raises(ConfigError, match=rf"--save_name=edges: .* holds edges.safetensors, {FOREIGN}"):
            save("edges")
        assert file.read_bytes() == content
    save("other")
    assert named_files(tmp_path) == ["edges.safetensors", "other.safetensors"]
    with pytest.raises(ConfigError, match=FOREIGN):
        save("edges")
    file.unlink()
    save("edges")
    assert named_files(tmp_path) == ["edges.safetensors"]


@pytest.mark.parametrize("first", ["edges", None])
@pytest.mark.parametrize("moment", ["the move", "the end"])
def test_a_kill_makes_nothing_foreign(moment: str, first: str | None, save: NoRun, tmp_path: Path) -> None:
    """The same name can be written anew after it, and another run deletes the file as that of a whole run."""
    save(first)
    save.killed_at(moment, "edges")
    assert named_files(tmp_path) == (["edges.safetensors"] if first or moment == "the end" else [])
    save.killed_at(moment, "edges")
    save("edges")
    save.killed_at(moment, "edges")
    save("other")
    assert named_files(tmp_path) == ["other.safetensors"]
    save("edges")
    assert named_files(tmp_path) == ["edges.safetensors"]


def test_a_file_of_the_users_after_a_kill(save: NoRun, tmp_path: Path) -> None:
    save.killed_at("the end", "edges")
    (tmp_path / "edges.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=FOREIGN):
        save("edges")
    save("other")
    assert named_files(tmp_path) == ["edges.safetensors", "other.safetensors"]


@pytest.mark.parametrize("fails", ["the move", "the push"])
@pytest.mark.parametrize("name", ["second", None])
def test_weights_that_cannot_be_written(
    name: str | None, fails: str, save: NoRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of an earlier run stays until those of the new one are there."""
    save("first")
    before = (tmp_path / "first.safetensors").read_bytes()

    def fail(_: object, what: object) -> None:
        if NAMED_FILES not in str(what):
            raise OSError("no way")

    with monkeypatch.context() as patch:
        if fails == "the push":
            patch.setattr(RunFolder, "push", fail)
        else:
            patch.setattr(final_weights, "os", SimpleNamespace(replace=fail))
        with pytest.raises(OSError, match="no way"):
            save(name)
    assert (tmp_path / "first.safetensors").read_bytes() == before
    save(name)
    assert named_files(tmp_path) == ([f"{name}.safetensors"] if name else [])


@pytest.mark.parametrize(
    "name",
    [
        "x.txt",
        WEIGHTS,
        "checkpoint-1/x.safetensors",
        "../x.safetensors",
        ".safetensors",
        "*.safetensors",
        "x\0.safetensors",
    ],
)
def test_a_record_with_other_names(name: str, tmp_path: Path) -> None:
    """Only a file that a run can have written is deleted, whatever the record says."""
    out = tmp_path / "run"
    (out / "checkpoint-1").mkdir(parents=True)
    (out / "x.safetensors").write_bytes(b"mine")
    file = out / name
    if "\0" not in name:
        file.write_bytes(b"mine")
    found = (file if "\0" not in name else out / "x.safetensors").stat()
    (out / NAMED_FILES).write_text(json.dumps({name: [[found.st_size, found.st_mtime_ns]]}))
    config = TrainConfig(pretrained_model_name_or_path="b", train_data_dir="d", save_name="edges")
    before = contents(tmp_path)
    check_named_file(config, RunFolder(str(out)))
    end_named_file(RunFolder(str(out)), None)
    del before[f"run/{NAMED_FILES}"]
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "states", [None, 4, [4, 1], [["4", 1]], [[4, 1, 1]], [[4, None]], [[4, 1.0]], {"size": 4}, [[4, 0]]]
)
def test_a_record_of_other_states(states: Any, tmp_path: Path) -> None:
    """Nothing is deleted whose time is not known, as in a store without times."""
    file = tmp_path / "edges.safetensors"
    file.write_bytes(b"mine")
    os.utime(file, ns=(1, 1))
    (tmp_path / NAMED_FILES).write_text(json.dumps({file.name: states}))
    end_named_file(RunFolder(str(tmp_path)), None)
    assert file.read_bytes() == b"mine"
    (tmp_path / NAMED_FILES).write_text(json.dumps({file.name: [[4, 1]]}))
    end_named_file(RunFolder(str(tmp_path)), None)
    assert not file.exists()


def test_a_sweep_is_not_stopped(
    sweep_settings: dict[str, Any], save: NoRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It writes NAME.safetensors to best/ and to trials' folders, and deletes nothing beside them."""
    save("first")
    (tmp_path / WEIGHTS).unlink()  # else a sweep would not start there
    (tmp_path / "edges.safetensors").write_bytes(b"mine")
    shared = TrainConfig(
        **sweep_settings | {"output_dir": str(tmp_path), "save_name": "edges", "latents_cache_dir": None}
    )
    space = {"resolution": {"grid": [64, 128]}}
    sweep = SweepConfig(train=shared, space=space, num_samples=1, allow_new_caches=True, scheduler="none")
    assert len(plan_sweep(sweep, io.StringIO()).runs) == 2
    assert "earlier --save_name" not in caplog.text


@pytest.mark.parametrize(
    "changed",
    [{"validation_image": "gone.png", "validation_prompt": "p"}, {"save_name": "mine"}, {"train_data_dir": "gone"}],
)
def test_a_refused_run_warns_of_no_deletion(
    changed: Settings,
    save: NoRun,
    run_settings: Settings,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save("first")
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    with pytest.raises(ConfigError):
        train(
            run_settings
            | {"save_name": "second", "output_dir": str(tmp_path), "resume_from_checkpoint": "latest"}
            | changed
        )
    assert "earlier --save_name" not in caplog.text


@pytest.fixture
def save_in_store(use_s3: S3Server, elsewhere: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> NoRun:
    """Return `save` for an object store, each time on another machine."""
    for key in use_s3.names("named/"):
        use_s3.client.delete_object(Bucket=BUCKET, Key=key)

    def folder() -> RunFolder:
        elsewhere()
        found = StoredFolder(f"s3://{BUCKET}/named")
        found.path.mkdir(parents=True)
        return found

    return NoRun(folder, monkeypatch)


def named_in_store(server: S3Server) -> list[str]:
    return [key.removeprefix("named/") for key in server.names("named/") if key.endswith("s") and WEIGHTS not in key]


def test_under_another_name_in_an_object_store(use_s3: S3Server, save_in_store: NoRun) -> None:
    """As on a disk, on another machine."""
    save_in_store("first")
    save_in_store("first")
    assert named_in_store(use_s3) == ["first.safetensors"]
    use_s3.write("named/mine.safetensors", b"mine")
    save_in_store("second")
    assert named_in_store(use_s3) == ["mine.safetensors", "second.safetensors"]
    use_s3.write("named/second.safetensors", b"mine")
    for name in ("mine", "second"):
        with pytest.raises(ConfigError, match=rf"--save_name={name}: s3://bucket/named holds {name}\..*, {FOREIGN}"):
            save_in_store(name)


def test_a_kill_in_an_object_store(use_s3: S3Server, save_in_store: NoRun) -> None:
    """The same name can be written anew; another run leaves the file, for only the store knew its time."""
    save_in_store.killed_at("the end", "edges")
    save_in_store("other")
    assert named_in_store(use_s3) == ["edges.safetensors", "other.safetensors"]
    save_in_store("edges")
    assert named_in_store(use_s3) == ["edges.safetensors"]
    save_in_store(None)
    assert named_in_store(use_s3) == []
