"""Validation images drawn beside the training, on a Ray with room for a worker more: the same ones, and no later."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from processes import kill_a_train_worker, last_step, when, workers_called
from runs import Settings, losses, run

from raycontrolnet.cluster.resources import share_out, worker_resources
from raycontrolnet.config.settings import ClusterConfig

GPU_BOX = {"CPU": 16, "GPU": 4, "accelerator_type:H100": 1}


@pytest.fixture
def settings(tiny_settings: Settings, circles: Path) -> Settings:
    """8 updates; images at 2, 4, 6 and the end."""
    control = sorted((circles / "conditioning").glob("*.png"))[:2]
    return tiny_settings | {
        "max_train_steps": 8,
        "checkpointing_steps": 100,
        "validation_steps": 2,
        "validation_prompt": ("a red circle", "a blue circle"),
        "validation_image": tuple(str(path) for path in control),
        "num_validation_images": 1,
        "report_to": "tensorboard",
    }


def images(output_dir: Path) -> dict[str, bytes]:
    folder = output_dir / "validation"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}


@pytest.mark.usefixtures("_local_ray")
@pytest.mark.parametrize(("workers", "cpus"), [("1", 1.0), pytest.param("2", 0.5, marks=pytest.mark.slow)])
def test_the_images_are_those_of_the_workers(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str, cpus: float
) -> None:
    options = {"num_workers": workers, "train_batch_size": 4 // int(workers), "cpus_per_worker": cpus}
    beside = run(settings, tmp_path / "beside", **options)
    monkeypatch.setattr(
        "raycontrolnet.launch.fit.worker_resources", lambda config: replace(worker_resources(config), spare=False)
    )
    alone = run(settings, tmp_path / "alone", **options | ({"num_workers": "0"} if workers == "1" else {}))
    timings = [json.loads((folder / "run.json").read_text())["timings"] for folder in (beside, alone)]
    assert timings[0]["validation_beside_s"] > 0
    assert "validation_beside_s" not in timings[1]
    assert losses(beside) == losses(alone)
    assert images(beside) == images(alone)
    assert len(images(beside)) == 4 * 2 * 3


@pytest.mark.usefixtures("_local_ray")
def test_a_lost_actor_is_replaced_by_the_workers(settings: Settings, tmp_path: Path) -> None:
    """Kill it as soon as it runs: the images that it was sent first are lost, the later ones are not."""
    out = tmp_path / "out"
    with when(
        lambda: bool(workers_called("ray::ValidationActor")), lambda: workers_called("ray::ValidationActor")[0].kill()
    ) as killed:
        run(settings, out, num_workers="1", cpus_per_worker=1.0)
    assert killed
    assert {name.partition("/")[0] for name in images(out)} >= {f"step-00000{step}" for step in (4, 6, 8)}
    assert "validation beside the training failed" in (out / "run.log").read_text()


@pytest.mark.usefixtures("_local_ray")
def test_a_lost_worker_finds_its_place_again(settings: Settings, tmp_path: Path) -> None:
    """The actor ends with the worker that owns it, so it does not hold the resources that the next worker needs."""
    settings |= {"max_train_steps": 12, "checkpointing_steps": 2, "num_workers": "1", "cpus_per_worker": 1.0}
    whole = run(settings | {"num_workers": "0"}, tmp_path / "whole")
    with when(lambda: last_step(tmp_path / "out") >= 5, kill_a_train_worker) as killed:
        out = run(settings, tmp_path / "out")
    assert killed
    assert losses(out) == losses(whole)
    last = {name: image for name, image in images(whole).items() if name.startswith("step-000012")}
    assert len(last) == 6
    assert last.items() <= images(out).items()


@pytest.mark.parametrize(
    ("num_workers", "nodes", "spare"),
    [
        ("3", [GPU_BOX], True),
        ("4", [GPU_BOX], False),
        ("1:3", [GPU_BOX], False),  # it would take the place for itself
        ("1:4", [GPU_BOX], False),
        ("1", [{"CPU": 3}], False),  # the worker takes all CPUs but one
        ("1", [{"CPU": 2, "GPU": 2}], False),  # a GPU, but no CPU for it
    ],
)
def test_where_there_is_room(num_workers: str, nodes: list[dict[str, float]], spare: bool) -> None:
    assert share_out(ClusterConfig(num_workers=num_workers), nodes, []).spare is spare
