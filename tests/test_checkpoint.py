"""Checkpoints are whole or not at all, and the right ones are kept and found."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import ControlNetModel
from reference import save_state, training
from runs import contents

from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.errors import ConfigError, RunError, UserError
from raycontrolnet.launch.fit import fit
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.storage import resume
from raycontrolnet.storage.checkpoint import Checkpoint
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training import saver
from raycontrolnet.training.state import StateParts, save_controlnet_config, write_parts

RUN = "the run's id"


def save(folder: Path) -> None:
    (folder / "controlnet").mkdir()
    (folder / "controlnet" / "weights.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "training_state.pt").write_bytes(b"moments")


def write(output_dir: Path, step: int, save: Callable[[Path], None] = save, run_id: str = RUN) -> Checkpoint:
    facts = {"data": "fingerprint", "settings": {"learning_rate": 1e-3}}
    return checkpoints.write(output_dir, step=step, samples=4 * step, seed=7, run_id=run_id, save=save, facts=facts)


def names(output_dir: Path) -> list[str]:
    """Everything that looks like a checkpoint or its remains."""
    found = [path.name for path in Path(output_dir).iterdir() if "checkpoint" in path.name]
    return sorted(found, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


# --- the sets that a run leaves ---


def test_what_runs_leave(tiny_settings: dict[str, Any]) -> None:
    settings = tiny_settings | {"max_train_steps": 6, "checkpointing_steps": 2, "train_batch_size": 1}
    output_dir = Path(settings["output_dir"])
    limited = settings | {"checkpoints_total_limit": 2}
    assert fit(TrainConfig(**limited)).checkpoint == output_dir / "checkpoint-6"
    assert names(output_dir) == ["checkpoint-4", "checkpoint-6"]
    result = fit(TrainConfig(**limited | {"max_train_steps": 8, "resume_from_checkpoint": "latest"}))
    assert result.checkpoint == output_dir / "checkpoint-8"
    assert names(output_dir) == ["checkpoint-6", "checkpoint-8"]


def test_without_a_limit_all_stay(tiny_settings: dict[str, Any]) -> None:
    fit(TrainConfig(**tiny_settings | {"max_train_steps": 6, "train_batch_size": 1}))
    assert names(tiny_settings["output_dir"]) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_the_last_update_gets_one_too(tiny_settings: dict[str, Any]) -> None:
    fit(TrainConfig(**tiny_settings | {"max_train_steps": 5, "checkpointing_steps": 3, "train_batch_size": 1}))
    assert names(tiny_settings["output_dir"]) == ["checkpoint-3", "checkpoint-5"]


def test_going_back_replaces_what_came_after(tiny_settings: dict[str, Any]) -> None:
    """From checkpoint-2 to 4 once more, with a limit: the newest by time stay, not those of the run before."""
    settings = tiny_settings | {"max_train_steps": 6, "train_batch_size": 1}
    fit(TrainConfig(**settings))
    again = {"max_train_steps": 4, "resume_from_checkpoint": "checkpoint-2", "checkpoints_total_limit": 1}
    fit(TrainConfig(**settings | again | {"learning_rate": 1e-2}))
    assert names(settings["output_dir"]) == ["checkpoint-4"]


# --- writing ---


def test_a_checkpoint(tmp_path: Path) -> None:
    before = time.time()
    written = write(tmp_path, 12)
    assert names(tmp_path) == ["checkpoint-12"]
    assert written.path == tmp_path / "checkpoint-12"
    assert (written.step, written.samples, written.seed, written.run_id) == (12, 48, 7, RUN)
    manifest = json.loads((written.path / "manifest.json").read_text())
    assert before <= manifest.pop("written_at") <= time.time()
    assert manifest == {
        "format": 1,
        "step": 12,
        "samples": 48,
        "seed": 7,
        "run_id": RUN,
        "files": {"controlnet/weights.safetensors": 10240, "training_state.pt": 7},
        "sha256": {
            "controlnet/weights.safetensors": hashlib.sha256(bytes(range(256)) * 40).hexdigest(),
            "training_state.pt": hashlib.sha256(b"moments").hexdigest(),
        },
        "data": "fingerprint",
        "settings": {"learning_rate": 1e-3},
    }
    assert Checkpoint.open(written.path) == written


def test_the_manifest_is_written_last(tmp_path: Path) -> None:
    def look_and_save(folder: Path) -> None:
        assert not (folder / "manifest.json").exists()
        assert not (tmp_path / "checkpoint-2").exists()
        save(folder)

    write(tmp_path, 2, look_and_save)
    manifest = (tmp_path / "checkpoint-2" / "manifest.json").stat().st_mtime_ns
    files = [path for path in (tmp_path / "checkpoint-2").rglob("*") if path.is_file()]
    assert len(files) == 3
    assert all(path.stat().st_mtime_ns <= manifest for path in files)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_former_ones(error: BaseException, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        save(folder)
        (folder / "more").write_bytes(b"half")
        raise error

    former = [write(tmp_path, 2), write(tmp_path, 4)]
    before = contents(tmp_path)
    for step in (6, 4):  # a new one, and one in the place of another
        with pytest.raises(type(error)):
            write(tmp_path, step, fail)
        assert contents(tmp_path) == before, "not even the half that was written: the disk may be full"
    assert checkpoints.all_checkpoints(tmp_path) == former
    assert write(tmp_path, 6).step == 6


def test_a_disk_that_fills_up_when_files_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    former = write(tmp_path, 2)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, 4)
    assert checkpoints.all_checkpoints(tmp_path) == [former]
    assert not (tmp_path / "checkpoint-4").exists()
    checkpoints.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-2"]


def test_a_full_disk_by_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch and safetensors say it in words of their own."""
    former = write(tmp_path, 2)

    def full(folder: Path) -> None:
        save(folder)
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    with pytest.raises(RuntimeError, match="inline_container"):
        write(tmp_path, 4, full)  # there is room: it is something else
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"No space left on device: .*: 10.2 kB of the checkpoint were written, 1 kB are"):
        write(tmp_path, 4, full)
    assert checkpoints.all_checkpoints(tmp_path) == [former]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        ValueError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
    ],
)
def test_a_used_up_quota(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk has room; a library's own words do not say why it failed."""
    former = write(tmp_path, 2)

    def fail(folder: Path) -> None:
        save(folder)
        raise error

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(
            OSError, match=r"Disk quota exceeded: .*: 10.2 kB of the checkpoint were written, your quota"
        ):
            write(tmp_path, 4, fail)
    assert checkpoints.all_checkpoints(tmp_path) == [former]


def test_others_may_read_what_the_umask_lets_them(tiny_settings: dict[str, Any]) -> None:
    before = os.umask(0o027)
    try:
        fit(TrainConfig(**tiny_settings))
    finally:
        os.umask(before)
    files = [path for path in Path(tiny_settings["output_dir"]).rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) == 3
    assert {path: oct(path.stat().st_mode & 0o777) for path in files} == dict.fromkeys(files, oct(0o640))


def test_a_process_killed_while_it_writes(tmp_path: Path) -> None:
    former = write(tmp_path, 2)
    code = f"""
        import os, pathlib, signal
        from raycontrolnet.storage import checkpoint
        def save(folder):
            (folder / "weights").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.write(pathlib.Path({str(tmp_path)!r}), step=4, samples=16, seed=7, run_id="x", save=save, facts={{}})
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=60).returncode == -9
    assert names(tmp_path) == ["checkpoint-2", ".checkpoint-4.partial"]
    assert checkpoints.latest(tmp_path) == former
    assert resume.resolve("latest", RunFolder(str(tmp_path))) == former
    checkpoints.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-2"]
    assert write(tmp_path, 4).step == 4


def test_writing_in_the_place_of_another(tmp_path: Path) -> None:
    write(tmp_path, 4, run_id="the run before")
    (tmp_path / "checkpoint-4" / "left over").write_bytes(b"of the run before")

    def save_other(folder: Path) -> None:
        (folder / "training_state.pt").write_bytes(b"other moments")

    written = write(tmp_path, 4, save_other)
    assert names(tmp_path) == ["checkpoint-4"]
    assert contents(written.path).keys() == {"manifest.json", "training_state.pt"}
    assert (written.path / "training_state.pt").read_bytes() == b"other moments"
    (written.path / "training_state.pt").unlink()  # and in the place of a damaged one
    assert write(tmp_path, 4).samples == 16
    assert names(tmp_path) == ["checkpoint-4"]


def test_a_run_whose_disk_fills_up(tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The former checkpoint is deleted only when the new one is in place; the run goes on from it."""
    settings = tiny_settings | {"checkpoints_total_limit": 1, "train_batch_size": 1}

    def full(controlnet: Any, parts: StateParts, folder: Path) -> None:
        write_parts(controlnet, parts, folder)
        if folder.name.startswith(".checkpoint-4."):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saver, "write_parts", full)
        with pytest.raises(RunError, match="No space left on device") as error:
            fit(TrainConfig(**settings))
    assert "The checkpoint of update 2 stands: go on with --resume_from_checkpoint latest" in str(error.value)
    assert names(settings["output_dir"]) == ["checkpoint-2"]
    assert json.loads((Path(settings["output_dir"]) / "run.json").read_text())["status"] == "failed"
    assert not (Path(settings["output_dir"]) / "diffusion_pytorch_model.safetensors").exists()
    fit(TrainConfig(**settings, resume_from_checkpoint="latest"))
    assert names(settings["output_dir"]) == ["checkpoint-4"]


def test_a_configuration_does_not_tell_where_it_was_read(
    tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of a ControlNet that was made nor of one that was read, in checkpoints and final weights; each once."""
    written: list[str] = []
    save_config = ControlNetModel.save_config

    def counted(self: ControlNetModel, save_directory: str | Path, **options: Any) -> None:
        written.append(Path(save_directory).name)
        save_config(self, save_directory, **options)

    monkeypatch.setattr(ControlNetModel, "save_config", counted)
    configs = []
    for number, read_from in enumerate((None, str(tmp_path / "0" / "controlnet"))):
        with training(tiny_settings | {"controlnet_model_name_or_path": read_from}) as state:
            assert ("_name_or_path" in state.components.controlnet.config) == bool(read_from)
            save_state(state, tmp_path / str(number))
            save_controlnet_config(state.components.controlnet, tmp_path / f"final-{number}")
        configs += [tmp_path / str(number) / "controlnet" / "config.json", tmp_path / f"final-{number}" / "config.json"]
    assert written == ["controlnet", "final-0", "controlnet", "final-1"]
    assert {file.read_text() for file in configs} == {configs[0].read_text()}
    assert "_name_or_path" not in configs[0].read_text()


# --- pruning ---


@pytest.mark.parametrize(("limit", "kept"), [(None, [2, 4, 6, 10]), (4, [2, 4, 6, 10]), (2, [6, 10]), (1, [10])])
def test_prune(limit: int | None, kept: list[int], tmp_path: Path) -> None:
    for step in (2, 4, 6, 10):
        write(tmp_path, step)
    (tmp_path / "checkpoint-notes").mkdir()
    checkpoints.prune(tmp_path, limit)
    assert names(tmp_path) == ["checkpoint-notes", *(f"checkpoint-{step}" for step in kept)]


def test_prune_keeps_the_newest_though_the_clock_was_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 2)
    write(tmp_path, 4)
    an_hour_ago = time.time() - 3600
    monkeypatch.setattr(time, "time", lambda: an_hour_ago)
    write(tmp_path, 6)
    checkpoints.prune(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_prune_does_not_count_damaged_ones(tmp_path: Path) -> None:
    """Else a damaged checkpoint would push out a good one."""
    for step in (2, 4, 6):
        write(tmp_path, step)
    (tmp_path / "checkpoint-6" / "training_state.pt").write_bytes(b"")
    checkpoints.prune(tmp_path, 2)
    assert [one.step for one in checkpoints.all_checkpoints(tmp_path)] == [2, 4]


# --- finding ---


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights truncated": (
        lambda path: os.truncate(path / "controlnet" / "weights.safetensors", 5000),
        "controlnet/weights.safetensors is truncated: 5000 of 10240 bytes",
    ),
    "state emptied": (
        lambda path: os.truncate(path / "training_state.pt", 0),
        "training_state.pt is truncated: 0 of 7 bytes",
    ),
    "file missing": (lambda path: (path / "training_state.pt").unlink(), "training_state.pt is missing"),
    "manifest missing": (
        lambda path: (path / "manifest.json").unlink(),
        "has no manifest.json, so it was not finished",
    ),
    "manifest truncated": (lambda path: os.truncate(path / "manifest.json", 60), "its manifest.json cannot be read ("),
    "manifest empty": (lambda path: os.truncate(path / "manifest.json", 0), "its manifest.json cannot be read ("),
    "manifest not text": (
        lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00"),
        "its manifest.json cannot be read (",
    ),
    "manifest of something else": (
        lambda path: (path / "manifest.json").write_text("[1]"),
        "its format is unknown, this version reads 1",
    ),
    "of a later version": (
        lambda path: (path / "manifest.json").write_text('{"format": 2}'),
        "its format is 2, this version reads 1",
    ),
    "manifest without files": (
        lambda path: edit_manifest(path, files=None),
        "its manifest.json does not say files",
    ),
    "manifest nested without end": (
        lambda path: (path / "manifest.json").write_text("[" * 200_000),
        "its manifest.json cannot be read (",
    ),
    "manifest with other sums": (lambda path: edit_manifest(path, sha256=None), "its manifest.json is damaged"),
    "manifest with sums of other files": (
        lambda path: edit_manifest(path, sha256={"gone": "0"}),
        "its manifest.json is damaged",
    ),
    "manifest with other kinds": (
        lambda path: edit_manifest(path, step="6", seed=None),
        "its manifest.json does not say seed, step",
    ),
}


def edit_manifest(path: Path, **changes: Any) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def overwrite(file: Path, start: int, data: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(data)


WEIGHTS = "controlnet/weights.safetensors"
BYTES: dict[str, Callable[[Path], Any]] = {
    "half of the weights zeroed": lambda path: overwrite(
        path / "controlnet" / "weights.safetensors", 5120, bytes(5120)
    ),
    "one bit of the weights": lambda path: overwrite(path / "controlnet" / "weights.safetensors", 10239, b"\xfe"),
    "noise for moments": lambda path: overwrite(path / "training_state.pt", 0, b"noisily"),
}


@pytest.mark.parametrize("damage", BYTES)
def test_bytes_that_changed_are_not_trained_on(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = write(tmp_path, 4), write(tmp_path, 6)
    assert resume.resolve("latest", RunFolder(str(tmp_path))) == bad
    BYTES[damage](bad.path)
    assert checkpoints.latest(tmp_path) == bad, "the size is right: only reading shows it"
    assert checkpoints.latest_sound(tmp_path) == good
    assert checkpoints.latest_sound(tmp_path, RUN) == good
    assert checkpoints.latest_sound(tmp_path, "another run") is None
    caplog.clear()
    assert resume.resolve("latest", RunFolder(str(tmp_path))) == good
    (record,) = caplog.records
    file = "training_state.pt" if "moments" in damage else WEIGHTS
    message = f"{file} is damaged: its bytes are not those that were written"
    assert record.getMessage() == f"{bad.path}: {message}; checkpoint-4 is used instead"
    with pytest.raises(ConfigError, match=f"=checkpoint-6: {message}; complete in {tmp_path}: checkpoint-4$"):
        resume.resolve("checkpoint-6", RunFolder(str(tmp_path)))
    BYTES[damage](good.path)
    with pytest.raises(ConfigError, match=r"holds only damaged checkpoints \(checkpoint-4, checkpoint-6\)"):
        resume.resolve("latest", RunFolder(str(tmp_path)))


def test_a_run_goes_on_from_the_newest_undamaged_one(tiny_settings: dict[str, Any]) -> None:
    settings = tiny_settings | {"max_train_steps": 6, "train_batch_size": 1}
    output_dir = Path(settings["output_dir"])
    fit(TrainConfig(**settings))
    weights = output_dir / "checkpoint-6" / "controlnet" / "diffusion_pytorch_model.safetensors"
    wanted = weights.read_bytes()
    overwrite(weights, 5000, bytes(5000))
    assert weights.read_bytes() != wanted
    fit(TrainConfig(**settings | {"resume_from_checkpoint": "latest"}))
    assert weights.read_bytes() == wanted, "trained again from checkpoint-4"


def test_a_state_without_checksums_that_is_noise(tiny_settings: dict[str, Any]) -> None:
    fit(TrainConfig(**tiny_settings))
    path = Path(tiny_settings["output_dir"]) / "checkpoint-4"
    edit_manifest(path, sha256={})
    overwrite(path / "training_state.pt", 0, bytes(3000))
    with pytest.raises(UserError, match=r"checkpoint-4/training_state\.pt is damaged; name an earlier checkpoint"):
        fit(TrainConfig(**tiny_settings | {"max_train_steps": 6, "resume_from_checkpoint": "latest"}))


def test_nothing_is_left_to_train(tiny_settings: dict[str, Any]) -> None:
    fit(TrainConfig(**tiny_settings))
    shown = io.StringIO()
    result = fit(
        TrainConfig(**tiny_settings | {"max_train_steps": 3, "resume_from_checkpoint": "latest"}), stream=shown
    )
    assert result.step == 4
    assert "updates 4 to 4" in shown.getvalue()
    assert "nothing is left to train: checkpoint-4 has 4 updates, and --max_train_steps=" in shown.getvalue()
    assert json.loads((result.output_dir / "run.json").read_text())["total_updates"] == 4


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_not_chosen(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoil, message = DAMAGES[damage]
    good, bad = write(tmp_path, 4), write(tmp_path, 6)
    assert checkpoints.latest(tmp_path) == bad
    spoil(bad.path)
    assert checkpoints.latest_sound(tmp_path) == good
    if "sums" not in damage:  # which only reading the files shows
        assert checkpoints.latest(tmp_path) == good
        assert checkpoints.all_checkpoints(tmp_path) == [good]
    caplog.clear()
    assert resume.resolve("latest", RunFolder(str(tmp_path))) == good
    if damage != "manifest missing":
        assert caplog.messages[0].startswith(f"{bad.path}: {message}")
        assert caplog.messages[0].endswith("; checkpoint-4 is used instead")
    with pytest.raises(ConfigError) as error:
        resume.resolve("checkpoint-6", RunFolder(str(tmp_path)))
    (problem,) = error.value.problems
    assert problem.startswith(f"--resume_from_checkpoint=checkpoint-6: {message}")


def test_only_folders_of_that_name_count(tmp_path: Path) -> None:
    good = write(tmp_path, 4)
    for other in ("checkpoint-9x", "checkpoint-", "my-checkpoint-9", ".checkpoint-9.old", ".checkpoint-9.partial"):
        good.path.rename(tmp_path / "aside")
        write(tmp_path, 9).path.rename(tmp_path / other)
        (tmp_path / "aside").rename(good.path)
    (tmp_path / "checkpoint-11").write_text("a file")
    assert checkpoints.latest(tmp_path) == good
    checkpoints.remove_leftovers(tmp_path)
    assert set(names(tmp_path)) == {
        "checkpoint-4", "checkpoint-9", "checkpoint-9x", "checkpoint-", "my-checkpoint-9", "checkpoint-11"
    }  # fmt: skip


def test_latest_counts_and_does_not_spell(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path) is None
    assert checkpoints.latest(tmp_path / "nowhere") is None
    for step in (1000, 999, 20):
        write(tmp_path, step, run_id=f"run {step}")
    latest = checkpoints.latest(tmp_path)
    assert latest is not None
    assert latest.step == 1000
    of_run = checkpoints.latest(tmp_path, "run 999")
    assert of_run is not None
    assert of_run.step == 999
    assert checkpoints.latest(tmp_path, "another run") is None


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By latest, by name under output_dir, by absolute and relative path: the path's folder counts."""
    output_dir, other = tmp_path / "out", tmp_path / "other"
    for folder in (output_dir, other):
        write(folder, 2)
        write(folder, 4)
    monkeypatch.chdir(tmp_path)
    for given, expected in {
        "latest": output_dir / "checkpoint-4",
        "checkpoint-2": output_dir / "checkpoint-2",
        "checkpoint-2/": output_dir / "checkpoint-2",
        str(other / "checkpoint-2"): other / "checkpoint-2",
        "other/checkpoint-2": other / "checkpoint-2",
        "./other/checkpoint-4": other / "checkpoint-4",
        "out/../other/checkpoint-4": other / "checkpoint-4",
    }.items():
        found = resume.resolve(given, RunFolder(str(output_dir)))
        assert found is not None
        assert found.path == expected
        assert found.path.is_absolute()
    monkeypatch.chdir(other)  # a name is one of output_dir
    found = resume.resolve("checkpoint-2", RunFolder(str(output_dir)))
    assert found is not None
    assert found.path == output_dir / "checkpoint-2"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            None,
            (
                "--output_dir={out}: holds checkpoint-4 of an earlier run. Go on with it: add --resume_from_checkpoint "
                "latest. Start anew: name another --output_dir, or delete that folder"
            ),
        ),
        ("checkpoint-3", "no such folder; complete in {out}: checkpoint-2, checkpoint-4"),
        ("{tmp}/gone/checkpoint-2", "no such folder; complete in {out}: checkpoint-2, checkpoint-4"),
        (
            "{tmp}/out",
            "has no manifest.json, so it was not finished; complete in {out}: checkpoint-2, checkpoint-4",
        ),
        ("{tmp}/file", "no such folder; complete in {out}: checkpoint-2, checkpoint-4"),
    ],
)
def test_resolve_fails_with_a_message(given: str | None, message: str, tmp_path: Path) -> None:
    output_dir = tmp_path / "out"
    write(output_dir, 2)
    write(output_dir, 4)
    (tmp_path / "file").write_text("")
    places = {"out": output_dir, "tmp": tmp_path}
    given = None if given is None else given.format(**places)
    with pytest.raises(ConfigError) as error:
        resume.resolve(given, RunFolder(str(output_dir)))
    prefix = "" if given is None else f"--resume_from_checkpoint={given}: "
    assert error.value.problems == (prefix + message.format(**places),)


def test_resolve_in_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-2.partial").mkdir()
    for given in (None, "latest"):
        assert resume.resolve(given, RunFolder(str(tmp_path))) is None
    with pytest.raises(ConfigError, match=rf"=checkpoint-2: no such folder; complete in {tmp_path}: none; leave the "):
        resume.resolve("checkpoint-2", RunFolder(str(tmp_path)))


def test_the_folder_of_a_sweep_is_not_written_over(tmp_path: Path) -> None:
    resume.check_holds_no_sweep(RunFolder(str(tmp_path)))
    (tmp_path / "sweep.json").write_text("{}")
    message = f"--output_dir={tmp_path}: holds a sweep, which `raycontrolnet tune --resume` goes on with; name another"
    with pytest.raises(ConfigError, match=f"^{message} --output_dir for a run$"):
        resume.check_holds_no_sweep(RunFolder(str(tmp_path)))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "checkpoint-2"])
@pytest.mark.parametrize("given", [None, "latest"])
def test_what_is_no_checkpoint_is_not_written_over(tmp_path: Path, name: str, given: str | None) -> None:
    (tmp_path / name).write_text("weights")
    with pytest.raises(ConfigError, match="which is no complete checkpoint of raycontrolnet and would be overwritten"):
        resume.resolve(given, RunFolder(str(tmp_path)))


@pytest.mark.parametrize("file", ["optimizer.bin", "random_states_0.pkl", "scheduler.bin"])
@pytest.mark.parametrize("given", [None, "latest", "checkpoint-500"])
def test_what_another_program_left_is_named_as_that(tmp_path: Path, file: str, given: str | None) -> None:
    """The folder and the checkpoints of diffusers' script have the same names."""
    other = tmp_path / "checkpoint-500"
    (other / "controlnet").mkdir(parents=True)
    (other / "controlnet" / "config.json").write_text("{}")
    (other / file).write_text("moments")
    with pytest.raises(ConfigError) as error:
        resume.resolve(given, RunFolder(str(tmp_path)))
    assert str(error.value).endswith(
        ": checkpoint-500 was written by another program, such as diffusers' script, and its optimizer cannot be read; "
        f"train its weights on in another --output_dir: add --controlnet_model_name_or_path {other}/controlnet"
    )
    assert "delete" not in str(error.value)
    assert checkpoints.latest(tmp_path) is None
