"""`raycontrolnet.tune.trainable` with trials in an object store: moto's S3 server, in this process."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import start_ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from s3_server import BUCKET, S3Server, elsewhere, s3, use_s3
from sweep_trials import losses
from test_own_tuner import donor_and_other, run

from raycontrolnet import TrainConfig, fit
from raycontrolnet.demo.shapes import write_shapes
from raycontrolnet.errors import ConfigError, UserError
from raycontrolnet.storage.files import user_cache
from raycontrolnet.storage.resume import checkpoint_at
from raycontrolnet.storage.stored_folder import StoredFolder
from raycontrolnet.tune import checkpoint_folder
from raycontrolnet.tune.trial_function import TuneCallback, _start

__all__ = ["elsewhere", "s3", "use_s3"]  # fixtures

WEIGHTS = "controlnet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def nodes(s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start a Ray whose processes find the server; return the folder of their caches."""
    import ray

    ray.shutdown()  # that of other tests
    caches = tmp_path_factory.mktemp("nodes")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3.environment, "XDG_CACHE_HOME": str(caches)}.items():
            patch.setenv(name, value)
        start_ray()
        yield caches
        ray.shutdown()


@pytest.fixture
def train(tiny_settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest) -> TrainConfig:
    """Return the settings of a trial of 4 updates, with a measurement and a checkpoint every 2."""
    rows = write_shapes(tmp_path / "rows", 16, resolution=32)
    own = {"train_data_dir": str(rows), "validation_steps": 2, "validation_split": 4, "num_workers": "1"}
    place = f"s3://{BUCKET}/{request.node.name}"
    return TrainConfig(**tiny_settings | own | {"output_dir": place, "checkpoints_total_limit": 1})


def losses_in(server: S3Server, place: str) -> list[float]:
    content = server.read(f"{place.partition(f'{BUCKET}/')[2]}/metrics.jsonl")
    return [json.loads(line)["loss"] for line in content.splitlines()]


def place_of(result: tune.Result, train: TrainConfig) -> str:
    """Return the URI of a trial's folder."""
    return f"{train.output_dir}/{result.metrics['trial_id']}"


def plain(train: TrainConfig, tmp_path: Path, **changes: Any) -> Path:
    """Train the same on a disk; return its folder."""
    out = tmp_path / "plain"
    changes = {"num_workers": "0", "output_dir": str(out), "checkpoints_total_limit": None} | changes
    fit(replace(train, **changes), stream=io.StringIO())
    return out


@pytest.mark.slow
def test_trials_some_of_which_are_stopped(s3: S3Server, nodes: Path, train: TrainConfig, tmp_path: Path) -> None:
    """They learn as on a disk, bit for bit; Tune's results lead to the weights; nodes keep nothing of them."""
    scheduler = ASHAScheduler(time_attr="step", grace_period=2, max_t=4, reduction_factor=2, stop_last_trials=False)
    space = {"learning_rate": tune.grid_search([2e-3, 1e-9, -1.0])}
    options = {"scheduler": scheduler, "max_concurrent_trials": 1}
    results = run(train, space, f"s3://{BUCKET}/tunes_own", **options)
    good, weak, bad = sorted(results, key=lambda result: -result.config["learning_rate"])
    assert (good.metrics["step"], weak.metrics["step"]) == (4, 2)
    assert "--learning_rate=-1.0: must be" in str(bad.error)
    out = plain(train, tmp_path, learning_rate=2e-3)
    assert losses_in(s3, place_of(good, train)) == losses(out)
    assert results.get_best_result().config == good.config
    folder = checkpoint_folder(good.checkpoint)
    assert (folder / WEIGHTS).read_bytes() == (out / "checkpoint-4" / WEIGHTS).read_bytes()
    records = [s3.read(f"{place_of(each, train).partition('bucket/')[2]}/run.json") for each in (good, weak)]
    assert [json.loads(each)["status"] for each in records] == ["finished", "stopped"]
    left = {path.parts[-4] for path in (nodes / "raycontrolnet" / "runs").rglob("*") if path.name == "checkpoint-4"}
    assert len(left) == 1, "what `checkpoint_folder` fetched"


@pytest.mark.slow
def test_population_based_training(s3: S3Server, nodes: Path, train: TrainConfig, tmp_path: Path) -> None:
    """The worse trial continues from the checkpoint of the better one, with settings of its own."""
    train = replace(train, max_train_steps=6, checkpoints_total_limit=None)
    donor, other = donor_and_other(train, tmp_path)
    start = checkpoint_folder(donor.checkpoint).with_name("checkpoint-4")
    for name in s3.names(f"{place_of(donor, train).partition('bucket/')[2]}/checkpoint-4/"):
        file = start / name.partition("/checkpoint-4/")[2]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(s3.read(name))
    out = plain(train, tmp_path, learning_rate=4e-3, resume_from_checkpoint=str(start))
    assert losses_in(s3, place_of(other, train))[4:] == losses(out)
    assert not list((nodes / "raycontrolnet" / "runs").rglob("driver*/*")), "fetched checkpoints go with the trials"


@pytest.mark.slow
def test_a_trial_of_two_workers(s3: S3Server, nodes: Path, train: TrainConfig, tmp_path: Path) -> None:
    """Workers that have no disk in common with the trial's process."""
    train = replace(train, num_workers="2", cpus_per_worker=0.5, train_batch_size=2)
    (result,) = run(train, {"learning_rate": tune.choice([2e-3])}, tmp_path)
    assert result.error is None
    assert (result.metrics["step"], checkpoint_folder(result.checkpoint).name) == (4, "checkpoint-4")
    assert losses_in(s3, place_of(result, train)) == losses(plain(train, tmp_path, learning_rate=2e-3, num_workers="2"))


@pytest.mark.usefixtures("elsewhere")
def test_a_run_that_starts_from_another_ones_checkpoint(
    use_s3: S3Server, run_settings: dict[str, Any], elsewhere: Any
) -> None:
    """By its URI, on another machine; it does not take the place of the other's files there."""
    donor, place = f"s3://{BUCKET}/donor", f"s3://{BUCKET}/heir"
    settings = run_settings | {"num_workers": "0", "output_dir": donor}
    fit(TrainConfig(**settings), stream=io.StringIO())
    elsewhere()
    of_another = settings | {"output_dir": place, "resume_from_checkpoint": f"{donor}/checkpoint-2"}
    fit(TrainConfig(**of_another), stream=io.StringIO())
    assert losses_in(use_s3, place) == losses_in(use_s3, donor)[2:]
    assert [each.step for each in StoredFolder(place).checkpoints()] == [4]
    own = settings | {"output_dir": place, "resume_from_checkpoint": f"{place}/checkpoint-4", "max_train_steps": 5}
    fit(TrainConfig(**own), stream=io.StringIO())
    assert len(losses_in(use_s3, place)) == 3
    gone = of_another | {"resume_from_checkpoint": f"{donor}/checkpoint-3"}
    with pytest.raises(
        ConfigError, match=r"=s3://bucket/donor/checkpoint-3: no such folder; complete in s3://bucket/h"
    ):
        fit(TrainConfig(**gone))


@pytest.mark.usefixtures("use_s3", "elsewhere")
def test_the_checkpoints_of_trials(tmp_path: Path) -> None:
    """A report names the run's own, or the other trial's that it started from; a pruned one is not waited for."""
    own, donor = (StoredFolder(f"s3://{BUCKET}/named/{name}") for name in ("own", "donor"))

    def write(folder: StoredFolder, step: int, run_id: str) -> str:
        how: dict[str, Any] = {
            "seed": 0,
            "run_id": run_id,
            "save": lambda to: (to / "x").write_text(run_id),
            "facts": {},
        }
        return folder.place_of(folder.write_checkpoint(step=step, samples=step, **how))

    pruned, gone = f"{own.place}/checkpoint-2", f"{donor.place}/checkpoint-2"
    assert _start(own, None) is None
    assert _start(own, pruned) is None
    kept, given = write(own, 3, "before"), write(donor, 4, "donor")
    assert _start(own, pruned) == "latest"
    assert (_start(own, kept), _start(own, given)) == (kept, given)
    with pytest.raises(UserError, match=r"^s3://bucket/named/donor/checkpoint-2: Tune .* it is gone; keep more with"):
        _start(own, gone)
    start = checkpoint_at(given, own)
    assert start
    callback = TuneCallback(own, 2, start)
    named = callback._checkpoint(5)
    assert named
    assert own.place_of(named) == given
    sound = own.sound(start)
    assert (sound.path / "x").read_text() == "donor"
    assert own.place_of(sound) == given
    write(own, 6, "now")
    assert callback._checkpoint(5) == start
    assert own.place_of(callback._checkpoint(6) or start) == f"{own.place}/checkpoint-6"
    assert list(user_cache().rglob("donor")), "fetched"
    own.clear(given)
    assert not sound.path.exists()
    assert not own.path.exists()
