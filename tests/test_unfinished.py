"""A checkpoint that is being written while workers fail: it is finished before Ray ends the process that writes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from runs import Settings, run

from raycontrolnet.cluster import unfinished
from raycontrolnet.cluster.unfinished import FinishesFirst
from raycontrolnet.errors import RunError
from raycontrolnet.storage.checkpoint import all_checkpoints

pytestmark = pytest.mark.usefixtures("_local_ray")

WRITING_S = 15.0
"""Time that the write takes after the failure; Ray would end its process in less."""


def failing_loop(failed: Path, how: str) -> Callable[[Mapping[str, Any]], Any]:
    """Return a worker loop that fails in update 6, while the checkpoint of update 4 is being written.

    Args:
        failed: a file that is there once a worker has failed.
        how: workers fail.
    """

    def loop(loop_config: Mapping[str, Any]) -> Any:
        import os
        import signal

        from raycontrolnet import train_controlnet
        from raycontrolnet.cluster.worker import place_among_workers
        from raycontrolnet.training import saver

        (rank, _), beside = place_among_workers(), {"beside": True}
        step, write, make = vars(train_controlnet)["train_step"], vars(saver)["write_parts"], saver.CheckpointSaver

        def failing_step(state: Any, *rest: Any) -> Any:
            if state.step == 5 and (rank == 1 or how == "all raise"):
                failed.touch()
                if how == "one is killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("the device is gone")
            return step(state, *rest)

        def slow_write(controlnet: Any, parts: Any, folder: Path) -> None:
            write(controlnet, parts, folder)
            if folder.name.startswith(".checkpoint-4."):
                while not failed.exists():
                    time.sleep(0.05)
                time.sleep(WRITING_S)

        changed: dict[tuple[Any, str], Any] = {
            (train_controlnet, "train_step"): failing_step,
            (train_controlnet, "CheckpointSaver"): lambda *args, **given: make(*args, **given | beside),
            (saver, "write_parts"): slow_write,
        }
        for (module, name), function in changed.items():
            setattr(module, name, function)
        return train_controlnet.train_controlnet(loop_config)

    return loop


@pytest.mark.parametrize(
    "how",
    [
        "all raise",
        pytest.param("one raises", marks=pytest.mark.slow),
        pytest.param("one is killed", marks=pytest.mark.slow),
    ],
)
def test_workers_that_fail_leave_the_checkpoint_that_was_written(
    tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    settings = tiny_settings | {"num_workers": "2", "cpus_per_worker": 1.0, "train_batch_size": 1, "max_train_steps": 8}
    loop = failing_loop(tmp_path / "failed", how)
    monkeypatch.setattr("raycontrolnet.train_controlnet.train_controlnet", loop)
    with pytest.raises(RunError, match="The checkpoint of update 4 stands"):
        run(settings, tmp_path / "out", max_failures=0)
    assert [each.step for each in all_checkpoints(tmp_path / "out")] == [2, 4]


class Group:
    """A group of one worker, with the one method of Ray's that is used."""

    def __init__(self) -> None:
        class Worker:
            def execute(self, function: Callable[..., object], *given: object) -> object:
                return function(*given)

        self.worker = ray.remote(num_cpus=0)(Worker).remote()

    def execute_single_async(self, rank: int, function: Callable[..., object], *given: object) -> Any:
        assert rank == 0
        return self.worker.execute.remote(function, *given)


def seconds_of(wait: FinishesFirst, group: Group) -> float:
    """Return how long the group is kept."""
    ray.get(group.worker.execute.remote(lambda: None))  # it has started
    start = time.monotonic()
    wait.before_worker_group_shutdown(group)
    return time.monotonic() - start


def test_it_is_waited_for_until_it_has_finished(tmp_path: Path) -> None:
    asked = tmp_path / "asked"

    def finished(patience_s: float) -> bool:
        with asked.open("a") as file:
            file.write(f"{patience_s:g} ")
        return len(asked.read_text().split()) == 3

    assert seconds_of(FinishesFirst(finished, 60), Group()) < 30
    assert asked.read_text() == "2 2 2 "


def test_a_process_that_is_gone_or_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    group, never = Group(), FinishesFirst(lambda _: False, 600)
    ray.get(group.worker.execute.remote(lambda: None))
    ray.kill(group.worker)
    start = time.monotonic()
    never.before_worker_group_shutdown(group)
    assert time.monotonic() - start < 60
    monkeypatch.setattr(unfinished, "ANSWER_S", 0.5)

    def stuck(_: float) -> bool:
        time.sleep(30)
        return False

    assert seconds_of(FinishesFirst(stuck, 600), Group()) < 25


def test_no_longer_than_the_limit() -> None:
    def not_yet(_: float) -> bool:
        time.sleep(0.2)
        return False

    assert 1 < seconds_of(FinishesFirst(not_yet, 1), Group()) < 30
