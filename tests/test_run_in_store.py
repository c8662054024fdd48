"""A run whose folder is in an object store, by a real S3 API: moto's server, in this process."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import ctrl_c, kill_9, start_ray, when, workers_called
from runs import Settings, column, flags, run
from s3_server import BUCKET, KEYS, S3Server, elsewhere, flaky_proxy, proxy_that_is_read_alone, s3, use_s3

from raycontrolnet import CheckConfig, GenerateConfig, TrainConfig, check, cli, fit, generate
from raycontrolnet.errors import ConfigError, RunError, UserError
from raycontrolnet.sampling import find_controlnet
from raycontrolnet.storage import store_lock
from raycontrolnet.storage.lock import Owner, content_of
from raycontrolnet.storage.object_store import ObjectStore
from raycontrolnet.storage.run_folder import RunFolder, folder_of
from raycontrolnet.storage.store_lock import StoreLock, store_locked
from raycontrolnet.storage.stored_folder import StoredFolder
from raycontrolnet.storage.uri import open_uri
from raycontrolnet.training.store_sync import aborted_if_lost

__all__ = ["elsewhere", "s3", "use_s3"]  # fixtures

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(run_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the same run to its end on a disk. Do not write into it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    fit(TrainConfig(**run_settings | {"output_dir": str(out)}))
    return out


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

    ray.shutdown()  # that of other tests
    start_ray()
    yield
    ray.shutdown()


@pytest.mark.usefixtures("elsewhere", "ray_in_store")
@pytest.mark.parametrize("one_is_killed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_workers_need_no_disk_in_common(
    one_is_killed: bool, use_s3: S3Server, validated_settings: Settings, tmp_path: Path
) -> None:
    """Two workers, and validation images; driver and workers have folders of their own."""
    settings = validated_settings | {
        "num_workers": "2",
        "cpus_per_worker": 0.5,
        "train_batch_size": 2,
        "max_failures": 1,
    }
    settings |= {"validation_split": 2, "max_train_steps": 6}

    def drawn() -> bool:
        return bool(use_s3.names("workers/validation/step-000002/metadata"))

    with when(lambda: one_is_killed and drawn(), lambda: workers_called("RayTrainWorker")[0].kill()) as done:
        fit(TrainConfig(**settings | {"output_dir": f"s3://{BUCKET}/workers"}))
    assert done == [True] * one_is_killed
    local = run(settings, tmp_path / "local", num_workers="0", gradient_accumulation_steps=2)
    assert losses(use_s3, "workers") == pytest.approx(column(local, "loss"), rel=0, abs=1e-5)
    names = {name.removeprefix("workers/") for name in use_s3.names("workers/") if not name.endswith("/")}
    there = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
    logs, events = ({name for name in names | there if part in name} for part in ("run-", "tfevents"))
    assert names - logs - events == there - events
    assert {f"run-worker-{rank}-{socket.gethostname()}.log" for rank in range(2)} <= logs
    assert json.loads(use_s3.read("workers/run.json"))["control_fidelity"] > 0


def test_it_goes_on_on_another_machine(use_s3: S3Server, run_settings: Settings, whole: Path, elsewhere: Any) -> None:
    settings = run_settings | {"output_dir": f"s3://{BUCKET}/moved"}
    fit(TrainConfig(**settings | {"max_train_steps": 2}))
    elsewhere()
    with pytest.raises(ConfigError, match=r"--output_dir=s3://bucket/moved: holds checkpoint-2 of an earlier run"):
        fit(TrainConfig(**settings))
    config = cli.parse("train", ["--config", f"{settings['output_dir']}/config.yaml", "--max_train_steps", "4"])
    fit(dataclasses.replace(config, resume_from_checkpoint="latest"))
    assert losses(use_s3, "moved") == column(whole, "loss")
    for folder in ("moved", "moved/checkpoint-4/controlnet"):  # no path of a machine
        assert use_s3.read(f"{folder}/config.json") == (whole / "config.json").read_bytes()
    assert use_s3.read(f"moved/{WEIGHTS}") == (whole / WEIGHTS).read_bytes()


def test_images_are_drawn_from_a_run_in_the_store(
    use_s3: S3Server, validated_settings: Settings, elsewhere: Any, tmp_path: Path
) -> None:
    place = f"s3://{BUCKET}/drawn"
    fit(TrainConfig(**validated_settings | {"output_dir": place, "max_train_steps": 2}))
    elsewhere()
    names = {"prompt": "validation_prompt", "image": "validation_image", "num_images": "num_validation_images"}
    settings = {name: validated_settings[of_run] for name, of_run in names.items()}
    for number, uri in enumerate((place, f"{place}/checkpoint-2", f"{place}/checkpoint-2/controlnet/")):
        out = tmp_path / str(number)
        pairs = generate(GenerateConfig(controlnet=uri, out=str(out), seed=7, use_gpu=False, **settings))
        for image in (image for pair in pairs for image in pair.images):
            assert image.read_bytes() == use_s3.read(f"drawn/validation/step-000002/{image.name}")


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("gone/x", r"cannot be used \(there is no bucket gone, or it is not yours\); name a folder"),
        (f"{BUCKET}/nothing", "there is no ControlNet; look for its name"),
        (f"{BUCKET}/drawn/chekpoint-2", "there is no ControlNet; name a checkpoint of it, such as s3://bucket/drawn/"),
        (f"{BUCKET}/drawn/checkpoint-9", "there is no ControlNet; name a checkpoint of it, such as s3://bucket/drawn/"),
    ],
)
def test_a_controlnet_that_is_not_there(use_s3: S3Server, name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"--controlnet=s3://{name}: {problem}"):
        find_controlnet.find(f"s3://{name}")


@pytest.mark.usefixtures("elsewhere")
def test_a_store_that_answers_now_and_then(
    use_s3: S3Server, run_settings: Settings, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request in ten fails."""
    with flaky_proxy(use_s3.endpoint, 10) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        place = f"s3://{BUCKET}/flaky?endpoint_override={proxy.removeprefix('http://')}&scheme=http"
        fit(TrainConfig(**run_settings | {"output_dir": place}))
    assert losses(use_s3, "flaky") == column(whole, "loss")
    assert use_s3.read(f"flaky/{WEIGHTS}") == (whole / WEIGHTS).read_bytes()


@pytest.mark.usefixtures("elsewhere")
def test_a_bucket_that_vanishes_in_mid_run(
    use_s3: S3Server, run_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run fails with the reason; what was committed stands."""
    settings = run_settings | {"output_dir": f"s3://{BUCKET}/vanishes"}
    upload = ObjectStore.upload

    def until_the_second(store: ObjectStore, file: Path, name: str, tries: int | None = None) -> None:
        if name.startswith("checkpoint-4"):
            raise OSError("AWS Error NO_SUCH_BUCKET during PutObject operation")
        upload(store, file, name, tries)

    monkeypatch.setattr(ObjectStore, "upload", until_the_second)
    with pytest.raises(
        RunError, match=r"s3://bucket/vanishes: checkpoint-4 cannot be written there \(AWS Error NO_SUCH"
    ) as e:
        fit(TrainConfig(**settings))
    assert "The checkpoint of update 2 stands: go on with --resume_from_checkpoint latest" in str(e.value)
    assert json.loads(use_s3.read("vanishes/run.json"))["status"] == "failed"
    assert b"checkpoint-4 was not written" in use_s3.read("vanishes/run.log")
    monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere", "ray_in_store")
def test_a_worker_whose_checkpoint_fails_says_so_in_its_log(
    use_s3: S3Server, run_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray ends it as soon as it hears of that, in the middle of an update."""

    def loop(loop_config: Any) -> Any:
        from raycontrolnet import train_controlnet

        upload, step = ObjectStore.upload, vars(train_controlnet)["train_step"]

        def fails(store: ObjectStore, file: Path, name: str, tries: int | None = None) -> None:
            if name.startswith("checkpoint-2"):
                raise OSError("AWS Error NO_SUCH_BUCKET during PutObject operation")
            upload(store, file, name, tries)

        def long_step(state: Any, *rest: Any) -> Any:
            if state.step == 2:
                time.sleep(60)
            return step(state, *rest)

        for owner, name, function in ((ObjectStore, "upload", fails), (train_controlnet, "train_step", long_step)):
            setattr(owner, name, function)
        return train_controlnet.train_controlnet(loop_config)

    monkeypatch.setattr("raycontrolnet.train_controlnet.train_controlnet", loop)
    settings = run_settings | {"output_dir": f"s3://{BUCKET}/told", "num_workers": "1", "max_failures": 0}
    with pytest.raises(RunError, match="checkpoint-2 cannot be written there"):
        fit(TrainConfig(**settings))
    log = use_s3.read(f"told/run-worker-0-{socket.gethostname()}.log").decode()
    assert "checkpoint-2 was not written" in log
    assert "NO_SUCH_BUCKET" in log
    assert "The run failed" in use_s3.read("told/run.log").decode()


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("s3://gone/run", r"cannot be used \(there is no bucket gone, or it is not yours\)"),
        ("s3://id:word@bucket/run", "leave keys and tokens out of the URI"),
        ("s3://bucket", "names a whole bucket; name a folder in it"),
        ("nowhere://bucket/run", "cannot be used"),
    ],
)
def test_places_that_cannot_be_used(use_s3: S3Server, run_settings: Settings, place: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"--output_dir.*: {problem}") as error:
        fit(TrainConfig(**run_settings | {"output_dir": place}))
    assert "word" not in str(error.value)
    assert not use_s3.names("run"), "what is refused leaves nothing"


@pytest.mark.usefixtures("elsewhere")
def test_a_bucket_that_may_be_read_alone(
    use_s3: S3Server, run_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check` refuses it as `train`, and a cache there is refused before anything is encoded."""
    use_s3.write("kept/1", b"1")
    place, denied = f"s3://{BUCKET}/locked", r"AWS Error ACCESS_DENIED during \w+ operation"
    config = TrainConfig(**run_settings | {"output_dir": place})
    cached = dataclasses.replace(config, output_dir=str(tmp_path / "out"), latents_cache_dir=place, cache_latents="on")
    told = io.StringIO()
    with proxy_that_is_read_alone(use_s3.endpoint) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        open_uri.cache_clear()
        for refusing in (lambda: check(CheckConfig(train=config), stream=told), lambda: fit(config)):
            with pytest.raises(ConfigError, match=rf"--output_dir={place}: cannot be used \({denied}.*\); name a "):
                refusing()
        message = rf"--latents_cache_dir={place}: cannot be written to \({denied}.*\); name a folder in a bucket to "
        with pytest.raises(UserError, match=message):
            fit(cached, stream=told)
    assert "latents: 0/" not in told.getvalue()
    monkeypatch.setenv("AWS_ENDPOINT_URL", use_s3.endpoint)
    open_uri.cache_clear()
    check(CheckConfig(train=config), stream=told)
    assert not use_s3.names("locked"), "a check leaves nothing"


@pytest.mark.usefixtures("elsewhere")
def test_nobody_answers(run_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    place = "s3://bucket/silent"
    problem = (
        rf"--output_dir={place}: cannot be used \(http://127.0.0.1:1 does not answer: Failed to connect .*\); name a "
    )
    with pytest.raises(ConfigError, match=problem):
        fit(TrainConfig(**run_settings | {"output_dir": place}))


@pytest.mark.usefixtures("elsewhere")
def test_one_run_at_a_time(use_s3: S3Server, run_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock of a run on this machine, and of one on another that gives no sign of life."""
    monkeypatch.setattr(store_lock, "DEAD_AFTER_S", 2.0)
    store = ObjectStore(f"s3://{BUCKET}/locked")
    settings = run_settings | {"output_dir": store.uri, "max_train_steps": 1}
    with store_locked(store), pytest.raises(ConfigError, match=rf"another run writes there: process {os.getpid()} on "):
        fit(TrainConfig(**settings))
    dead = Owner(host="other", machine="another one", pid=1)
    use_s3.write("locked/.lock.json", content_of(dead, 3).encode())
    fit(TrainConfig(**settings))
    assert not [name for name in use_s3.names("locked/") if name.endswith(".lock.json")]


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("saves", [False, True])
def test_another_run_takes_the_folder_over(
    saves: bool, use_s3: S3Server, run_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a cut of the network: the run ends, says who has it, and leaves what is there, while it saves too."""
    name = f"taken-{saves}"
    place = f"s3://{BUCKET}/{name}"
    monkeypatch.setattr(StoreLock, "interval_s", 0.2)
    other = Owner(host="node-7", machine="another one", pid=12)
    working, left, lost = StoredFolder(place).path, [], threading.Event()
    close = ObjectStore.close

    def closed(self: ObjectStore, reason: str) -> None:
        close(self, reason)
        lost.set()

    monkeypatch.setattr(ObjectStore, "close", closed)

    def take_over() -> None:
        while not lost.is_set():
            use_s3.write(f"{name}/.lock.json", content_of(other, 3).encode())  # a beat under way may write once more
            time.sleep(0.1)
        time.sleep(1.0)  # for what was on its way
        left.append(sorted((key, use_s3.read(key)) for key in use_s3.names(f"{name}/")))

    settings = run_settings | {"output_dir": place, "max_train_steps": 900, "checkpoints_total_limit": 1}
    settings["checkpointing_steps"] = 1 if saves else 900
    metrics = working / "metrics.jsonl"
    with when(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, take_over) as done:  # noqa: SIM117
        with pytest.raises(RunError) as error:
            fit(TrainConfig(**settings))
    assert done == [True]
    assert str(error.value) == (
        f"--output_dir={place}: another run has taken the folder over: process 12 on node-7; this one has ended. "
        "Leave the folder to that one, or name another --output_dir"
    )
    assert sorted((key, use_s3.read(key)) for key in use_s3.names(f"{name}/")) == left[0]
    assert dict(left[0])[f"{name}/.lock.json"].startswith(b'{"host": "node-7"')
    assert f"{name}/{WEIGHTS}" not in dict(left[0])


def test_workers_elsewhere_are_ended(use_s3: S3Server) -> None:
    """Workers on Ray have the folder by means of their own."""
    aborted = threading.Event()
    folder = StoredFolder(f"s3://{BUCKET}/workers-elsewhere")
    with aborted_if_lost(folder, aborted.set):
        assert not aborted.wait(1.5)
        folder.store.close("taken")
        assert aborted.wait(10)
    for write in (
        lambda: folder.store.write("a", b""),
        lambda: folder.store.upload(Path(__file__), "a"),
        lambda: folder.store.delete(["a"]),
        lambda: folder.store.delete_folder("a"),
    ):
        with pytest.raises(OSError, match="taken"):
            write()
    assert not use_s3.names("workers-elsewhere")
    with aborted_if_lost(RunFolder("/a/disk"), pytest.fail):
        pass


@pytest.mark.usefixtures("elsewhere")
def test_a_checkpoint_that_is_given_up_on_its_way(use_s3: S3Server) -> None:
    """The one before stands; what was sent is no checkpoint."""
    folder = StoredFolder(f"s3://{BUCKET}/given-up")
    how: dict[str, Any] = {"seed": 0, "run_id": "it", "save": lambda to: (to / "x").write_text("1"), "facts": {}}
    folder.write_checkpoint(step=1, samples=1, **how)

    def check() -> None:
        if "given-up/checkpoint-2/x" in use_s3.names("given-up/"):
            raise InterruptedError("given up")

    with pytest.raises(OSError, match="given up"):
        folder.write_checkpoint(step=2, samples=2, check=check, **how)
    assert "given-up/checkpoint-2/x" in use_s3.names("given-up/"), "it was on its way"
    assert [each.step for each in folder.checkpoints()] == [1]


@pytest.mark.usefixtures("elsewhere")
def test_a_damaged_checkpoint_is_passed_over(
    use_s3: S3Server, run_settings: Settings, whole: Path, elsewhere: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings = run_settings | {"output_dir": f"s3://{BUCKET}/damaged"}
    fit(TrainConfig(**settings | {"max_train_steps": 3, "checkpointing_steps": 1}))
    weights = "damaged/checkpoint-3/controlnet/diffusion_pytorch_model.safetensors"
    use_s3.write(weights, bytes(len(use_s3.read(weights))))
    use_s3.client.delete_object(Bucket=BUCKET, Key="damaged/checkpoint-2/training_state.pt")
    elsewhere()
    fit(TrainConfig(**settings | {"resume_from_checkpoint": "latest"}))
    assert f"s3://{BUCKET}/damaged/checkpoint-3: controlnet/{WEIGHTS} is damaged" in caplog.text
    assert losses(use_s3, "damaged") == column(whole, "loss")
    assert use_s3.read(f"damaged/{WEIGHTS}") == (whole / WEIGHTS).read_bytes()


def test_the_oldest_checkpoints_are_deleted(use_s3: S3Server, run_settings: Settings, elsewhere: Any) -> None:
    settings = run_settings | {"output_dir": f"s3://{BUCKET}/pruned", "checkpoints_total_limit": 2}
    fit(TrainConfig(**settings | {"checkpointing_steps": 1}))
    found = {name.split("/")[1] for name in use_s3.names("pruned/checkpoint-")}
    assert found == {"checkpoint-3", "checkpoint-4"}
    folder = StoredFolder(f"s3://{BUCKET}/pruned")
    assert [path.name for path in folder.path.glob("checkpoint-*")] == ["checkpoint-4"], "of no use on this machine"


@pytest.mark.usefixtures("elsewhere")
def test_killed_in_the_middle_it_goes_on(
    use_s3: S3Server, run_settings: Settings, elsewhere: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kill -9` after the first checkpoint; then on another machine, from another folder, by the URI alone."""
    settings = run_settings | {"output_dir": f"s3://{BUCKET}/killed", "max_train_steps": 32, "checkpointing_steps": 4}
    command = [sys.executable, "-m", "raycontrolnet", "train", *flags(settings)]
    kill_9(command, lambda: use_s3.names("killed/checkpoint-8/manifest"))
    assert json.loads(use_s3.read("killed/run.json"))["status"] == "running"
    elsewhere()
    monkeypatch.chdir(tmp_path)
    fit(TrainConfig(**settings | {"resume_from_checkpoint": "latest"}))
    local = run(settings, tmp_path / "local")
    assert losses(use_s3, "killed") == column(local, "loss")
    assert use_s3.read(f"killed/{WEIGHTS}") == (local / WEIGHTS).read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_sigterm_to_the_driver(use_s3: S3Server, run_settings: Settings) -> None:
    """The workers, which see no disk of the driver's, write a checkpoint of the current update."""
    settings = run_settings | {"output_dir": f"s3://{BUCKET}/ended", "num_workers": "1", "max_train_steps": 5000}
    settings |= {"checkpointing_steps": 10_000}
    command = [sys.executable, "-m", "raycontrolnet", "train", *flags(settings)]
    # Of the driver: before it knows that workers train, a signal ends the run at once.
    metrics = StoredFolder(f"s3://{BUCKET}/ended").path / "metrics.jsonl"
    process, stderr = ctrl_c(command, metrics.exists, whole_group=False, number=signal.SIGTERM)
    assert process.returncode == 143, stderr
    steps = {int(name.split("/")[1].partition("-")[2]) for name in use_s3.names("ended/checkpoint-")}
    assert len(steps) == 1, stderr
    (step,) = steps
    assert len(losses(use_s3, "ended")) == step
    assert json.loads(use_s3.read("ended/run.json"))["status"] == "interrupted"
    assert f"(--output_dir s3://{BUCKET}/ended)" in stderr


@pytest.mark.parametrize(
    ("patterns", "folder"),
    [
        (["run.json"], ""),
        (["trials/*/run.json", "trials/*/validation/*"], "trials"),
        (["trials/0001/metrics.jsonl", "trials/0001/validation/*"], "trials/0001"),
        (["trials/000[1-3]/run.json"], "trials"),
        (["trials/*", "run.json"], ""),
        (["/elsewhere/logs/*", "run.json"], ""),
        (["../logs/*"], ""),
        ([], ""),
    ],
)
def test_only_the_folder_of_the_patterns_is_listed(patterns: list[str], folder: str) -> None:
    assert folder_of(patterns) == folder
