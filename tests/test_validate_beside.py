"""Validation images drawn beside the training, on a Ray with room for a worker more: the same ones, and no later."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from processes import kill_a_train_worker, last_step, when, workers_called
from runs import Run, Settings, losses, metadata, run, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from raycontrolnet.cluster.resources import share_out, worker_resources
from raycontrolnet.config.cluster_settings import ClusterConfig
from raycontrolnet.training.validation import step_folder

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
def test_images_and_scores_are_those_of_the_worker(
    validated_settings: Settings, validated_run: Run, tmp_path: Path
) -> None:
    on_ray = {"output_dir": str(tmp_path / "beside"), "num_workers": "1", "cpus_per_worker": 1.0}
    beside, result, shown = train(validated_settings | on_ray)
    alone = validated_run.folder
    assert_the_same(beside, alone)
    assert len(images(beside)) == 2 * 2 * (2 + 2)
    for step in (2, 4):
        scored, expected = (metadata(step_folder(folder, step)) for folder in (beside, alone))
        assert len([line["control_fidelity"] for line in scored]) == 4
        assert scored == expected
        assert f"step {step}: control fidelity" in shown
    assert result.control_fidelity == validated_run.result.control_fidelity
    events = EventAccumulator(str(beside / "logs" / "train_controlnet")).Reload()
    assert sorted(event.step for event in events.Scalars("control_fidelity")) == [2, 4]


@pytest.mark.slow
@pytest.mark.usefixtures("_local_ray")
def test_the_images_are_those_of_two_workers(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Settings = {"num_workers": "2", "train_batch_size": 2, "cpus_per_worker": 0.5}
    beside = run(settings, tmp_path / "beside", **options)
    monkeypatch.setattr(
        "raycontrolnet.launch.fit.worker_resources", lambda config: replace(worker_resources(config), spare=False)
    )
    assert_the_same(beside, run(settings, tmp_path / "alone", **options))
    assert len(images(beside)) == 4 * 2 * 3


def assert_the_same(beside: Path, alone: Path) -> None:
    timings = [json.loads((folder / "run.json").read_text())["timings"] for folder in (beside, alone)]
    assert timings[0]["validation_beside_s"] > 0
    assert "validation_beside_s" not in timings[1]
    assert losses(beside) == losses(alone)
    assert images(beside) == images(alone)


@pytest.mark.slow
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


@pytest.mark.slow
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
