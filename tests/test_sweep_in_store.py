"""Sweeps whose folder is in an object store, by a real S3 API: moto's server, in this process."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from processes import kill_9, start_ray, when
from s3_server import BUCKET, KEYS, S3Server, elsewhere, s3
from sweeps import leaderboard, run_sweep

from raycontrolnet import SweepConfig, SweepResult, TrainConfig, cli, sweep
from raycontrolnet.config.train_config import public_settings
from raycontrolnet.errors import ConfigError, RunError
from raycontrolnet.storage import uri as uri_module
from raycontrolnet.storage.stored_folder import StoredFolder
from raycontrolnet.tune import checkpoint_folder
from raycontrolnet.tune.lease import LEASE_FILE, SweepLease
from raycontrolnet.tune.store_sync import open_sweep

__all__ = ["elsewhere", "s3"]  # fixtures

WEIGHTS = "diffusion_pytorch_model.safetensors"
MEASURED_TIMES = ("seconds", "images_per_second")


@pytest.fixture(scope="module")
def _ray_in_store(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Start a Ray whose processes find the server, for all tests here."""
    import ray

    ray.shutdown()  # that of other tests
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3.environment, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("nodes"))}.items():
            patch.setenv(name, value)
        start_ray()
        yield
        ray.shutdown()


pytestmark = pytest.mark.usefixtures("_ray_in_store")


@pytest.fixture
def tiny_sweep(sweep_settings: dict[str, Any]) -> SweepConfig:
    """Return a sweep of two trials of four updates, one after the other: in one process, which is quicker."""
    train = TrainConfig(**sweep_settings | {"max_train_steps": 4, "report_to": "tensorboard"})
    space = {"learning_rate": {"grid": [1e-3, 1e-5]}}
    return SweepConfig(train=train, space=space, num_samples=1, scheduler="none", max_concurrent_trials=1)


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
    assert without_numbers(names_in(server, name)) == without_numbers(here)


def without_numbers(names: set[str]) -> set[str]:
    """Return the names without times, processes and how often a sweep went on: TensorBoard's and Tune's files."""
    return {re.sub(r"(tfevents|checkpoint_).*", r"\1", name) for name in names}


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


def test_a_kind_of_store_that_pyarrow_was_built_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_built(uri: str) -> None:
        raise pa.ArrowNotImplementedError("Got GCS URI but Arrow compiled without GCS support")

    monkeypatch.setattr(uri_module, "open_uri", not_built)
    with pytest.raises(ConfigError, match=r"^--output_dir=gs://bucket/sweep: cannot be used \(Got GCS URI but Arrow"):
        open_sweep("gs://bucket/sweep", "logs/*")


@pytest.mark.slow
def test_it_goes_on_on_another_machine(s3: S3Server, tiny_sweep: SweepConfig, elsewhere: Any, tmp_path: Path) -> None:
    """`kill -9` in the midst; then by the URI alone. What had finished is not trained again."""
    train = replace(tiny_sweep.train, max_train_steps=8, report_to="none")
    config = replace(tiny_sweep, train=train, resume=True)
    config_file, space_file = tmp_path / "train.yaml", tmp_path / "space.yaml"
    config_file.write_text(yaml.safe_dump(public_settings(train) | {"output_dir": f"s3://{BUCKET}/killed"}))
    space_file.write_text(yaml.safe_dump(config.space))
    flags = {"config": config_file, "space": space_file, "num_samples": 1, "scheduler": "none"}
    flags |= {"max_concurrent_trials": 1}
    words = (str(word) for name, value in flags.items() for word in (f"--{name}", value))

    def in_the_midst() -> bool:
        time.sleep(0.5)  # the server shares this process's time
        return bool(s3.names("killed/trials/0001/checkpoint-2/manifest"))

    kill_9([sys.executable, "-m", "raycontrolnet", "tune", *words], in_the_midst)
    finished = s3.read("killed/trials/0000/run.json")
    elsewhere()
    said = io.StringIO()
    sweep(into(config, f"s3://{BUCKET}/killed"), stream=said)
    assert "sweep: 1 trial," in said.getvalue()
    assert s3.read("killed/trials/0000/run.json") == finished
    assert states(s3, "killed") == ["finished"] * 2
    compare(s3, "killed", run_sweep(config))


@pytest.mark.slow
def test_another_driver_takes_over(s3: S3Server, tiny_sweep: SweepConfig, elsewhere: Any) -> None:
    """The first one ends, and leaves the store to the other."""
    elsewhere()
    place = f"s3://{BUCKET}/taken"
    config = into(tiny_sweep, place)
    config = replace(config, train=replace(config.train, max_train_steps=5000))
    other = SweepLease(StoredFolder(place, "other"), "another")
    other.sweep_dir.mkdir(parents=True)

    def begun() -> bool:
        time.sleep(0.5)
        return bool(s3.names("taken/trials/0000/checkpoint-2/manifest"))

    with (
        when(begun, other.set),
        pytest.raises(RunError, match="Another driver goes on with the sweep in s3://bucket/taken; this one has ended"),
    ):
        run_sweep(config)
    assert s3.read(f"taken/{LEASE_FILE}") == b"another"
    assert json.loads(s3.read("taken/sweep.json"))["status"] == "running"
    assert states(s3, "taken") == ["running"], "the second trial has not begun, as there is one at a time"


@pytest.mark.slow
def test_trials_of_two_workers_some_of_which_are_stopped(s3: S3Server, tiny_sweep: SweepConfig, elsewhere: Any) -> None:
    """Tune's results lead to the weights, on another machine too."""
    changes: dict[str, Any] = {"num_workers": "2", "cpus_per_worker": 0.5, "train_batch_size": 2, "max_train_steps": 8}
    train = replace(tiny_sweep.train, **changes)
    config = replace(tiny_sweep, train=train, scheduler="asha", grace_period=2)
    result = run_sweep(into(config, f"s3://{BUCKET}/stopped"))
    assert states(s3, "stopped") == ["finished", "stopped"]
    assert json.loads(s3.read("stopped/trials/0001/run.json"))["status"] == "stopped"
    for row in board(s3, "stopped"):  # with what the trials' workers have written
        lines = s3.read(f"stopped/trials/{row['trial']}/validation.jsonl").splitlines()
        measured = {record["step"]: record["val_loss"] for record in map(json.loads, lines)}
        assert float(row["val_loss"]) == measured[int(row["step"])]
    elsewhere()
    assert result.grid is not None
    (best,) = [each for each in result.grid if each.metrics["val_loss"] == result.value]
    weights = checkpoint_folder(best.checkpoint) / "controlnet" / WEIGHTS
    assert weights.read_bytes() == s3.read(f"stopped/trials/0000/checkpoint-8/controlnet/{WEIGHTS}")
