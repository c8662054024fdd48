"""A run whose folder on a disk another one has taken over, as after a cut of the network: it ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import when
from test_lock import leave_lock, owner

from raycontrolnet import cli
from raycontrolnet.errors import RunError
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.storage import files
from raycontrolnet.storage.files import FolderClosedError, is_closed, remove_folder, replacing, replacing_folder
from raycontrolnet.storage.folder_lock import FolderLock, locked
from raycontrolnet.storage.lock import DEAD_AFTER_S, LOCK_FILE, Owner, content_of
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training.failures import record_failure, record_hang
from raycontrolnet.training.metrics import MetricsLog
from raycontrolnet.training.run_marks import STOP_FILE, ask_to_stop, remove_marks
from raycontrolnet.training.store_sync import aborted_if_lost, run_folder_open

Settings = dict[str, Any]
OTHER = Owner(host="node-7", machine="another one", pid=12)


@pytest.fixture(autouse=True)
def _no_folder_stays_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_closed", {})
    monkeypatch.setattr(FolderLock, "interval_s", 0.2)


def take_over(folder: Path) -> None:
    """Put the lock of another run in place of the one that is there."""
    beside = folder.with_name("lock-of-another")
    beside.write_text(content_of(OTHER, 3))
    os.replace(beside, folder / LOCK_FILE)


def content(folder: Path) -> dict[str, bytes | None]:
    """Return name -> bytes of all that is in a folder; None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("saves", [False, True])
def test_the_run_ends(saves: bool, tiny_settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """It says who has the folder, and changes nothing there, while it saves too; what is committed stands."""
    out, left = Path(tiny_settings["output_dir"]), []

    def by_another() -> None:
        while not is_closed(out):
            take_over(out)  # a sign of life under way may be written once more
            time.sleep(0.1)
        time.sleep(1.0)  # for what was on its way
        left.append(content(out))

    settings = tiny_settings | {"max_train_steps": 9000, "checkpoints_total_limit": 2, "validation_split": 4}
    settings |= {"checkpointing_steps": 1 if saves else 2000, "validation_steps": 1}
    metrics = out / "metrics.jsonl"
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    with when(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, by_another) as done:
        assert cli.main(["train", *words]) == 1
    assert done == [True]
    said = capsys.readouterr().err
    assert said.endswith(
        f"error: --output_dir={out}: another run has taken the folder over: process 12 on node-7; this one has ended. "
        "Leave the folder to that one, or name another --output_dir\n"
    )
    assert "Traceback" not in said
    assert content(out) == left[0]
    assert owner(out)["host"] == "node-7"
    assert len(checkpoints.all_checkpoints(out)) == (2 if saves else 0)
    (out / LOCK_FILE).unlink()
    if saves:  # the same process goes on once the other has ended
        last = checkpoints.all_checkpoints(out)[-1].step
        words += ["--resume_from_checkpoint", "latest", "--max_train_steps", str(last + 1)]
        assert cli.main(["train", *words]) == 0
        assert checkpoints.all_checkpoints(out)[-1].step == last + 1


def test_a_run_that_had_just_ended(tmp_path: Path) -> None:
    """It does not say that all is well: the other may have read its files half written."""
    folder = RunFolder(str(tmp_path / "run"))

    def lose() -> None:
        with run_folder_open(folder):
            take_over(folder.path)
            while not folder.is_lost:
                time.sleep(0.05)

    with pytest.raises(RunError, match="process 12 on node-7; this one has ended"):
        lose()


def test_a_take_over_that_has_ended_is_seen(tmp_path: Path) -> None:
    """As by a machine that slept: the other run came and went between two signs of life."""
    with locked(tmp_path) as mine:
        (tmp_path / LOCK_FILE).unlink()
        mine._seen_at -= DEAD_AFTER_S + 1
        mine.beat()
        assert mine.lost
        assert mine.lost.startswith("another run may have taken the folder over, and ended: .lock.json is gone there")
        assert is_closed(tmp_path)
        mine.beat()
        assert not (tmp_path / LOCK_FILE).exists(), "the folder is free"
    with locked(tmp_path):
        assert not is_closed(tmp_path)


def test_late_signs_of_life(tmp_path: Path) -> None:
    """A lock that is still there has not been taken over; nor has a folder that is gone, or where no lock could be."""
    folder = tmp_path / "run"
    with locked(folder) as mine:
        mine._seen_at -= 10 * DEAD_AFTER_S
        mine.beat()
        assert (mine.lost, owner(folder)["beat"]) == (None, 1)
        mine._seen_at -= 10 * DEAD_AFTER_S
        folder.rename(tmp_path / "elsewhere")
        mine.beat()
        folder.mkdir()  # by the run's next checkpoint
        mine.beat()
        assert (mine.lost, owner(folder)["beat"]) == (None, 2)
    (tmp_path / "file").touch()
    with locked(tmp_path / "file" / "below") as mine:
        mine._seen_at -= 10 * DEAD_AFTER_S
        mine.beat()
        assert mine.lost is None


CHANGES: dict[str, Callable[[Path], object]] = {
    "file": lambda folder: replacing(folder / "a").__enter__(),
    "folder": lambda folder: replacing_folder(folder / "new").__enter__(),
    "removal": lambda folder: remove_folder(folder / "old"),
    "delete": lambda folder: RunFolder(str(folder)).delete("a"),
    "prune": lambda folder: RunFolder(str(folder)).prune(1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_changes_in_a_closed_folder(name: str, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    (folder.path / "old").mkdir(parents=True)
    (folder.path / "a").write_text("other's")
    log = MetricsLog(folder.path, 0)
    for step in range(2):
        checkpoints.write(
            folder.path, step=step, samples=0, seed=0, run_id="r", save=lambda to: (to / "x").touch(), facts={}
        )
    before = content(folder.path)
    folder.close("taken")
    with pytest.raises(FolderClosedError, match=r"^taken$"):
        CHANGES[name](folder.path)
    with pytest.raises(FolderClosedError, match=r"^taken$"):
        log.append({"step": 1})
    log.close()
    ask_to_stop(folder)
    assert not (folder.path / STOP_FILE).exists(), "it is the other run that would stop"
    record_failure(folder.path, RunError("mine"))
    record_hang(folder.path, "mine")
    remove_marks(folder)
    assert content(folder.path) == before


@pytest.mark.parametrize("make", [replacing, replacing_folder])
def test_what_was_begun_is_not_committed(make: Any, tmp_path: Path) -> None:
    """The folder is lost while a file or checkpoint is written."""
    target = tmp_path / "run" / "a"
    target.parent.mkdir()

    def write() -> None:
        with make(target) as partial:
            (partial / "x" if partial.is_dir() else partial).write_text("mine")
            files.close_folder(target.parent, "taken")

    with pytest.raises(FolderClosedError, match=r"^taken$"):
        write()
    assert not list(target.parent.iterdir())


def test_workers_elsewhere_are_ended(tmp_path: Path) -> None:
    aborted, folder = threading.Event(), RunFolder(str(tmp_path))
    with aborted_if_lost(folder, aborted.set):
        assert not aborted.wait(1.5)
        with locked(tmp_path) as mine:
            leave_lock(tmp_path)
            mine.beat()
        assert aborted.wait(10)
