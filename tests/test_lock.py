"""One run at a time writes to a folder; the lock of a dead one is taken over."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raycontrolnet import TrainConfig, fit
from raycontrolnet.errors import ConfigError
from raycontrolnet.storage import folder_lock
from raycontrolnet.storage.folder_lock import FolderLock, locked
from raycontrolnet.storage.lock import LOCK_FILE, UNHEARD_AFTER_S, Owner, has_ended, is_gone

HOLD = """
import sys, pathlib
from raycontrolnet.storage.folder_lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process_holds(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def owner(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / LOCK_FILE).read_text()))


def leave_lock(folder: Path, **changes: Any) -> Owner:
    """Write the lock of a process that is gone, or is said to be elsewhere."""
    left = dataclasses.replace(Owner(), **changes)
    folder.mkdir(exist_ok=True)
    (folder / LOCK_FILE).write_text(json.dumps(dataclasses.asdict(left)))
    return left


def test_a_second_run_is_refused(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """And leaves what the first has written: partial checkpoints would be leftovers of a dead run."""
    out = Path(tiny_settings["output_dir"])
    with another_process_holds(out) as process:
        partial = out / ".checkpoint-2.partial"
        partial.mkdir()
        with pytest.raises(ConfigError) as error:
            fit(TrainConfig(**tiny_settings))
        assert partial.is_dir()
        (problem,) = error.value.problems
        assert problem.startswith(f"--output_dir={out}: another run writes there: process {process.pid} on ")
        assert "; wait for its end, stop it, or name another --output_dir (if there is no such run, delete " in problem
        process.kill()
        process.wait()
        assert owner(out)["pid"] == process.pid
        fit(TrainConfig(**tiny_settings))  # it is dead
    assert not (out / LOCK_FILE).exists()


def test_a_process_id_that_is_used_again(tmp_path: Path) -> None:
    leave_lock(tmp_path, process_started="1")
    with locked(tmp_path):
        assert owner(tmp_path)["process_started"] != "1"


@pytest.mark.parametrize("content", ["", "{", '{"host": "a"}', "[]"])
def test_a_lock_that_is_cut_short(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    with locked(tmp_path):
        assert owner(tmp_path)["pid"] == Owner().pid


def test_an_owner_on_another_machine_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "DEAD_AFTER_S", 3.0)
    left = leave_lock(tmp_path, machine="elsewhere", host="node-7", pid=12)
    start = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - start >= 3
    left = leave_lock(tmp_path, machine="elsewhere", host="node-7", pid=12, since=time.time() - 3725)

    def live() -> None:
        for beat in range(1, 30):
            time.sleep(0.1)
            (tmp_path / LOCK_FILE).write_text(json.dumps(dataclasses.asdict(dataclasses.replace(left, beat=beat))))

    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(ConfigError, match=r"process 12 on node-7, for 1:02:0\d; wait for"), locked(tmp_path):
        pass
    thread.join()
    assert owner(tmp_path)["token"] == left.token


def test_ctrl_c_while_it_settles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook the process lives on: its lock must not."""
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_signs_of_life(tmp_path: Path) -> None:
    with locked(tmp_path) as mine:
        before = owner(tmp_path)
        mine.beat()
        assert owner(tmp_path) == before | {"beat": 1}
        (tmp_path / LOCK_FILE).unlink()  # by somebody; nobody can have taken it for dead yet
        mine.beat()
        assert owner(tmp_path) == before | {"beat": 2}
        (tmp_path / LOCK_FILE).write_text("{")  # another's, which is being written
        mine.beat()
        assert (mine.lost, (tmp_path / LOCK_FILE).read_text()) == (None, "{")
        other = leave_lock(tmp_path, host="node-7", pid=12)
        mine.beat()
        assert mine.lost == "another run has taken the folder over: process 12 on node-7"
        assert owner(tmp_path)["token"] == other.token
    assert owner(tmp_path)["token"] == other.token


def test_a_sign_of_life_that_comes_after_the_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is ended in haste does not wait for the thread that gives them."""
    found = FolderLock.found
    with locked(tmp_path) as mine:

        def found_and_released(lock: FolderLock) -> Owner | None:
            owner = found(lock)
            lock.release()
            return owner

        with monkeypatch.context() as patch:
            patch.setattr(FolderLock, "found", found_and_released)
            mine.beat()
        assert not (tmp_path / LOCK_FILE).exists()
        mine.beat()
        assert not (tmp_path / LOCK_FILE).exists(), "nor does a later one"


def test_many_find_a_dead_one_at_once(tmp_path: Path) -> None:
    leave_lock(tmp_path, process_started="1")
    ready = threading.Barrier(8)
    over, refused = threading.Event(), []

    def take(_: int) -> bool:
        ready.wait()
        try:
            with locked(tmp_path):
                over.wait(60)
                return True
        except ConfigError:
            refused.append(True)
            if len(refused) == 7:
                over.set()
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(8))) == 1
    assert not list(tmp_path.iterdir())


def test_a_new_folder_goes_if_it_stays_empty(tmp_path: Path) -> None:
    with locked(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    with locked(tmp_path / "used"):
        (tmp_path / "used" / "file").touch()
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["file"]
    (tmp_path / "old").mkdir()
    with locked(tmp_path / "old"):
        pass
    assert (tmp_path / "old").is_dir()


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    """The run's own checks say it with the other problems."""
    (tmp_path / "file").touch()
    with locked(tmp_path / "file"):
        pass
    with locked(tmp_path / "file" / "below"):
        pass


GONE: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], bool | None]] = {
    "alive": (lambda own: own, False),
    "another process of this id": (lambda own: own | {"process_started": "1"}, True),
    "no such process": (lambda own: own | {"pid": 2**22 + 1}, True),
    "on another machine": (lambda own: own | {"machine": "elsewhere"}, None),
    "not said": (lambda own: {}, None),
    "nonsense": (lambda own: {"pid": [], "machine": 3}, None),
}


@pytest.mark.parametrize("case", GONE)
def test_processes_that_are_gone(case: str) -> None:
    change, gone = GONE[case]
    assert is_gone(change(Owner().process())) is gone


def test_a_run_on_another_machine_ends_when_its_beat_does(tmp_path: Path) -> None:
    elsewhere = Owner().process() | {"machine": "elsewhere"}
    with locked(tmp_path) as lock:
        old = time.time() - 2 * UNHEARD_AFTER_S
        os.utime(tmp_path / LOCK_FILE, (old, old))
        assert has_ended(tmp_path, elsewhere)
        assert not has_ended(tmp_path, Owner().process()), "it is seen to live"
        lock.beat()
        assert not has_ended(tmp_path, elsewhere)
    assert has_ended(tmp_path, elsewhere), "nobody writes there"
