"""Sweeps whose folder is in an object store, by a real S3 API: moto's server, in this process."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from s3_server import BUCKET, KEYS, S3Server, s3
from sweeps import leaderboard, run_sweep

from raycontrolnet import SweepConfig, SweepResult, TrainConfig, cli

__all__ = ["s3"]  # a fixture

WEIGHTS = "diffusion_pytorch_model.safetensors"
MEASURED_TIMES = ("seconds", "images_per_second")


@pytest.fixture(scope="module")
def _ray_in_store(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start a Ray whose processes find the server, for all tests here."""
    import ray

    from raycontrolnet.cluster.session import set_up_environment

    ray.shutdown()  # that of other tests
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3.environment, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("nodes"))}.items():
            patch.setenv(name, value)
        set_up_environment()
        ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


pytestmark = pytest.mark.usefixtures("_ray_in_store")


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that lets the driver see no folder of what was: another machine."""

    def move() -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("machine")))

    move()
    return move


@pytest.fixture
def tiny_sweep(sweep_settings: dict[str, Any]) -> SweepConfig:
    """Return a sweep of two trials of four updates."""
    train = TrainConfig(**sweep_settings | {"max_train_steps": 4, "report_to": "tensorboard"})
    return SweepConfig(train=train, space={"learning_rate": {"grid": [1e-3, 1e-5]}}, num_samples=1, scheduler="none")


def into(config: SweepConfig, place: str, **changes: Any) -> SweepConfig:
    return replace(config, train=replace(config.train, output_dir=place), **changes)


def figures(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if name not in MEASURED_TIMES} for row in rows]


def names_in(server: S3Server, name: str) -> set[str]:
    return {key.removeprefix(f"{name}/") for key in server.names(f"{name}/") if not key.endswith("/")}


def board(server: S3Server, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(server.read(f"{name}/leaderboard.csv").decode())))


def states(server: S3Server, name: str) -> list[str]:
    records = [key for key in server.names(f"{name}/trials/") if key.endswith("/trial.json")]
    return [json.loads(server.read(key))["state"] for key in sorted(records)]


def compare(server: S3Server, name: str, local: SweepResult) -> None:
    """Compare what the sweep `name` has left in the store with the same sweep on a disk."""
    assert figures(board(server, name)) == figures(leaderboard(local))
    assert server.read(f"{name}/best/{WEIGHTS}") == (local.output_dir / "best" / WEIGHTS).read_bytes()
    here = {path.relative_to(local.output_dir).as_posix() for path in local.output_dir.rglob("*") if path.is_file()}
    assert without_event_files(names_in(server, name)) == without_event_files(here)


def without_event_files(names: set[str]) -> set[str]:
    """Return the names without TensorBoard's files, which are named by time and process, but with their folders."""
    return {each.rpartition("/")[0] if "tfevents" in each else each for each in names}


@pytest.mark.usefixtures("elsewhere")
def test_what_a_sweep_leaves(s3: S3Server, tiny_sweep: SweepConfig) -> None:
    """The same as on a disk, and no keys."""
    result = run_sweep(into(tiny_sweep, f"s3://{BUCKET}/left"))
    assert result.uri == f"s3://{BUCKET}/left"
    assert json.loads(s3.read("left/sweep.json"))["status"] == "finished"
    assert json.loads(s3.read("left/trials/0001/run.json"))["status"] == "finished"
    assert f"s3://{BUCKET}/left/best" in s3.read("left/best/README.md").decode()
    compare(s3, "left", run_sweep(tiny_sweep))
    everything = b"".join(s3.read(f"left/{name}") for name in names_in(s3, "left"))
    assert not [key for key in KEYS.values() if key.encode() in everything]


def test_a_bucket_that_is_not_there(tiny_sweep: SweepConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train = tiny_sweep.train
    flags = {"pretrained_model_name_or_path": train.pretrained_model_name_or_path, "output_dir": "s3://gone/sweep"}
    flags |= {"train_data_dir": str(train.train_data_dir)}
    assert cli.main(["tune", *(word for name, value in flags.items() for word in (f"--{name}", value))]) == 2
    said = capsys.readouterr().err
    assert "--output_dir=s3://gone/sweep: cannot be used (there is no bucket gone, or it is not yours)" in said
