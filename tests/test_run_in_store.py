"""A run whose folder is in an object store, by a real S3 API: moto's server, in this process."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import last_step, when, workers_called
from runs import Settings, column, run
from s3_server import BUCKET, KEYS, S3Server, s3, use_s3

from raycontrolnet import TrainConfig, fit
from raycontrolnet.errors import ConfigError
from raycontrolnet.storage.run_folder import StoredFolder

__all__ = ["s3", "use_s3"]  # fixtures

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(run_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the same run to its end on a disk. Do not write into it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    fit(TrainConfig(**run_settings | {"output_dir": str(out)}))
    return out


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that lets what comes see no folder of what was: another machine."""

    def move() -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("machine")))

    move()
    return move


def losses(server: S3Server, name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in server.read(f"{name}/metrics.jsonl").splitlines()]


@pytest.mark.usefixtures("elsewhere")
def test_what_a_run_leaves(use_s3: S3Server, run_settings: Settings, whole: Path) -> None:
    result = fit(TrainConfig(**run_settings | {"output_dir": f"s3://{BUCKET}/left"}))
    assert (result.step, result.uri) == (4, f"s3://{BUCKET}/left")
    names = {name.removeprefix("left/") for name in use_s3.names("left/") if not name.endswith("/")}
    there = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    assert names == there
    assert losses(use_s3, "left") == column(whole, "loss")
    assert use_s3.read(f"left/{WEIGHTS}") == (whole / WEIGHTS).read_bytes()
    assert json.loads(use_s3.read("left/run.json"))["status"] == "finished"
    everything = b"".join(use_s3.read(f"left/{name}") for name in names)
    assert not [key for key in KEYS.values() if key.encode() in everything]


@pytest.fixture
def ray_in_store(use_s3: S3Server) -> Iterator[None]:
    """Start a Ray whose workers find the server."""
    import ray

    from raycontrolnet.cluster.session import set_up_environment

    ray.shutdown()  # that of other tests
    set_up_environment()
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("elsewhere", "ray_in_store")
def test_workers_need_no_disk_in_common(use_s3: S3Server, validated_settings: Settings, tmp_path: Path) -> None:
    """Two workers, of which one is killed, and validation images; driver and workers have folders of their own."""
    settings = validated_settings | {
        "num_workers": "2",
        "cpus_per_worker": 0.5,
        "train_batch_size": 2,
        "max_failures": 1,
    }
    place, folder = f"s3://{BUCKET}/workers", StoredFolder(f"s3://{BUCKET}/workers")
    settings |= {"validation_split": 2, "max_train_steps": 6}
    with when(
        lambda: last_step(folder.path) >= 3, lambda: os.kill(workers_called("RayTrainWorker")[0], signal.SIGKILL)
    ) as done:
        fit(TrainConfig(**settings | {"output_dir": place}))
    assert done
    local = run(settings, tmp_path / "local", num_workers="0", gradient_accumulation_steps=2)
    assert losses(use_s3, "workers") == pytest.approx(column(local, "loss"), rel=0, abs=1e-5)
    names = {name.removeprefix("workers/") for name in use_s3.names("workers/") if not name.endswith("/")}
    there = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
    logs = {"run-worker-0.log", "run-worker-1.log"}
    assert {name for name in names if "tfevents" not in name} - logs == {
        name for name in there if "tfevents" not in name
    }
    assert logs <= names
    assert json.loads(use_s3.read("workers/run.json"))["control_fidelity"] > 0


def test_it_goes_on_on_another_machine(use_s3: S3Server, run_settings: Settings, whole: Path, elsewhere: Any) -> None:
    settings = run_settings | {"output_dir": f"s3://{BUCKET}/moved"}
    fit(TrainConfig(**settings | {"max_train_steps": 2}))
    elsewhere()
    with pytest.raises(ConfigError, match=r"--output_dir=s3://bucket/moved: holds checkpoint-2 of an earlier run"):
        fit(TrainConfig(**settings))
    fit(TrainConfig(**settings | {"resume_from_checkpoint": "latest"}))
    assert losses(use_s3, "moved") == column(whole, "loss")
    assert use_s3.read(f"moved/{WEIGHTS}") == (whole / WEIGHTS).read_bytes()
