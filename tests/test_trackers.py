"""Trackers: what the tools wrote is read back from their own files."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runs import flags

from raycontrolnet.config.output_settings import OutputConfig
from raycontrolnet.config.train_config import TrainConfig, public_settings
from raycontrolnet.signals import HASTE_S, ending_signals_raised
from raycontrolnet.training import trackers
from raycontrolnet.training.trackers import check_trackers, open_trackers, resolve

SECRETS = ("hf_in_settings", "hf_in_environment", "hf_in_arguments", "a" * 40, "comet_key_comet_key")

SCRIPT = """
import json, logging, sys
from pathlib import Path
from raycontrolnet.config.output_settings import OutputConfig
from raycontrolnet.training.trackers import open_trackers

logging.basicConfig(level=logging.INFO)
folder, name, done_steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
settings = {"learning_rate": 1e-5, "validation_prompt": ["a", "b"], "seed": None, "hub_token": "hf_in_settings"}
output = OutputConfig(output_dir=str(folder / "out"), logging_dir=str(folder / "logs"), report_to=name,
                      tracker_project_name="circles", tracker_group="my-sweep")
opened = open_trackers(output, settings, done_steps=done_steps)
for step in (done_steps + 1, done_steps + 2):
    opened.scalars(step, {"loss": step / 10, "lr": 1e-5})
for pair in (0, 1):  # equal prompts, and later than the scalars of the next step
    opened.images(done_steps + 1, f"validation/pair-{pair:02d}", [folder / f"{pair}.png"], "red circle")
assert opened.names == (name,), opened.names
opened.close()
"""


class Slow(trackers.Tracker):
    """A tool that waits for an upload, or fails."""

    def __init__(self, run: trackers.Run):
        self.closed, self.uploaded = threading.Event(), threading.Event()

    def scalars(self, step: int, values: Any) -> None: ...

    def images(self, step: int, key: str, paths: Any, caption: str) -> None: ...

    def close(self) -> None:
        self.uploaded.wait(60)
        self.closed.set()


class Failing(Slow):
    def close(self) -> None:
        raise LookupError("no network")


def test_no_upload_is_waited_for_after_a_second_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "_KINDS", {"slow": Slow, "failing": Failing})
    with ending_signals_raised():
        opened = trackers.Trackers(["failing", "slow"], trackers.Run(tmp_path, "", "", {}, 0, None))
        slow = opened._open["slow"]
        assert isinstance(slow, Slow)
        for _ in range(2):
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        began = time.monotonic()
        opened.close()
        assert time.monotonic() - began < HASTE_S + 1
    slow.uploaded.set()
    assert slow.closed.wait(10), "it goes on beside the end"
    assert "failing failed (LookupError: no network)" in caplog.text
    assert "slow is not waited for any longer" in caplog.text
    leisurely = trackers.Trackers(["failing", "slow"], trackers.Run(tmp_path, "", "", {}, 0, None))
    threading.Timer(0.5, leisurely._open["slow"].uploaded.set).start()  # type: ignore[attr-defined]
    later = leisurely._open["slow"]
    leisurely.close()
    assert isinstance(later, Slow)
    assert later.closed.is_set(), "without a signal all is waited for"


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{index}.png" for index in range(2)]
    for index, path in enumerate(paths):
        Image.new("RGB", (12, 8), (index * 200, 10, 20)).save(path)
    return paths


def run_script(folder: Path, name: str, done_steps: int = 0, **environment: str) -> None:
    """Run it in its own process: the tools keep threads, patch modules and read the environment once."""
    environment = {"HF_TOKEN": "hf_in_environment", "PYTHONPATH": str(Path(trackers.__file__).parents[2])} | environment
    arguments = [sys.executable, "-c", SCRIPT, str(folder), name, str(done_steps), "--hub_token=hf_in_arguments"]
    done = subprocess.run(
        arguments, env=os.environ | environment, cwd=folder, text=True, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    everything = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    for path in folder.rglob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            everything += map(archive.read, archive.namelist())
    assert any(b"red circle" in content for content in everything)
    for secret in SECRETS:
        assert secret not in done.stdout + done.stderr
        assert not any(secret.encode() in content for content in everything), secret


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    return event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def reporting_to(names: str, folder: Path = Path("out"), **settings: Any) -> OutputConfig:
    return OutputConfig(report_to=names, output_dir=str(folder), tracker_project_name="p", **settings)


def test_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(reporting_to("none")) == ()
    assert resolve(reporting_to("wandb, tensorboard,wandb")) == ("wandb", "tensorboard")
    monkeypatch.setitem(trackers._PACKAGES, "wandb", ("no-such-package", "pip install 'raycontrolnet[wandb]'"))
    monkeypatch.setitem(trackers._PACKAGES, "comet_ml", ("nor-this-one", "pip install 'raycontrolnet[comet]'"))
    assert resolve(reporting_to("all")) == ("tensorboard",)
    assert resolve(reporting_to("wandb")) == ("wandb",)
    assert check_trackers(reporting_to("all")) == check_trackers(reporting_to("tensorboard")) == []
    assert check_trackers(reporting_to("wandb,tensorboard,comet_ml")) == [
        "--report_to=wandb: the package no-such-package is not installed: pip install 'raycontrolnet[wandb]'",
        "--report_to=comet_ml: the package nor-this-one is not installed: pip install 'raycontrolnet[comet]'",
    ]


def test_a_folder_called_wandb_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raycontrolnet_no_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(trackers._PACKAGES, "wandb", ("raycontrolnet_no_tracker", ""))
    assert check_trackers(reporting_to("wandb")) != []


def test_tensorboard(tmp_path: Path, pictures: list[Path]) -> None:
    config = TrainConfig(
        pretrained_model_name_or_path="base", train_data_dir="data", hub_token="hf_in_settings", validation_steps=7
    )
    settings = public_settings(config) | {"hub_token": "hf_in_settings"}  # a caller's slip
    opened = open_trackers(reporting_to("tensorboard", tmp_path), settings)
    for step in (1, 2, 3):
        opened.scalars(step, {"loss": 0.5 / step, "lr": 1e-5})
    for pair, path in enumerate(pictures):
        opened.images(2, f"validation/pair-{pair:02d}", [path], "red circle")
    opened.images(2, "several", pictures, "blue circle")
    opened.close()
    opened.close()

    read = events(tmp_path / "logs/p")
    assert sorted(read.Tags()["scalars"]) == ["loss", "lr"]
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [
        (1, 0.5), (2, 0.25), (3, pytest.approx(1 / 6))
    ]  # fmt: skip
    keys = ["several/00", "several/01", "validation/pair-00", "validation/pair-01"]
    assert sorted(read.Tags()["images"]) == keys
    for key in keys:
        (image,) = read.Images(key)
        assert (image.step, image.width, image.height) == (2, 12, 8)
        stored = tmp_path / "stored.png"
        stored.write_bytes(image.encoded_image_string)
        assert Image.open(stored).getpixel((0, 0)) == (int(key[-1]) * 200, 10, 20)
    (text,) = read.Tensors("validation/pair-01/prompt/text_summary")
    assert text.tensor_proto.string_val == [b"red circle"]
    files = [path.read_bytes() for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    assert any(b"validation_steps" in content for content in files)  # the hyperparameters
    assert not any(b"hf_in_settings" in content for content in files)


def test_tensorboard_of_a_continued_run(tmp_path: Path) -> None:
    """Killed after step 5, resumed from the checkpoint of step 2: one curve without a fold."""
    for done_steps, last, loss in ((0, 5, 1.0), (2, 4, 2.0)):
        opened = open_trackers(reporting_to("tensorboard", tmp_path), {}, done_steps=done_steps)
        for step in range(done_steps + 1, last + 1):
            opened.scalars(step, {"loss": loss})
        opened.close()
        if done_steps == 0:
            # TensorBoard reads files in the order of their names, which hold the second of their making
            for path in (tmp_path / "logs/p").iterdir():
                path.rename(path.with_name(path.name.replace("tfevents.", "tfevents.0")))
    curve = [(event.step, event.value) for event in events(tmp_path / "logs/p").Scalars("loss")]
    assert curve == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_wandb_offline(tmp_path: Path, pictures: list[Path]) -> None:
    pytest.importorskip("wandb")
    for done_steps in (0, 2):
        run_script(tmp_path, "wandb", done_steps, WANDB_MODE="offline", WANDB_API_KEY="a" * 40)
    stored = [read_wandb(path) for path in sorted((tmp_path / "logs").rglob("run-*.wandb"))]
    assert len(stored) == 2
    for read, done_steps in zip(stored, (0, 2), strict=True):
        history = read["history"]
        losses = [(row["step"], row["loss"]) for row in history if "loss" in row]
        assert losses == [(step, pytest.approx(step / 10)) for step in (done_steps + 1, done_steps + 2)]
        for pair in range(2):
            key = f"validation/pair-{pair:02d}"
            (row,) = [row for row in history if f"{key}/filenames" in row]
            assert (row["step"], row[f"{key}/captions"]) == (done_steps + 1, ["red circle"])
            (name,) = row[f"{key}/filenames"]
            file = next((tmp_path / "logs").rglob(Path(name).name))
            assert file.read_bytes() == pictures[pair].read_bytes()
        assert read["config"] == {"learning_rate": 1e-5, "validation_prompt": ["a", "b"], "seed": None}
        assert (read["project"], read["name"], read["group"]) == ("circles", "out", "my-sweep")
        assert read["id"] == (tmp_path / "logs/wandb_id.txt").read_text()


def read_wandb(path: Path) -> dict[str, Any]:
    """Read a run's offline file, in protocol buffers of W&B's own definition."""
    import wandb.proto.wandb_internal_pb2

    messages: Any = wandb.proto.wandb_internal_pb2
    history: list[dict[str, Any]] = []
    read: dict[str, Any] = {"history": history}
    for data in leveldb_records(path.read_bytes(), start=7):
        record = messages.Record.FromString(data)
        if record.HasField("run"):
            run = record.run
            read |= {"project": run.project, "name": run.display_name, "id": run.run_id, "group": run.run_group}
            config = {item.key: json.loads(item.value_json) for item in run.config.update}
            read["config"] = {name: value for name, value in config.items() if not name.startswith("_")}
        if record.HasField("history"):
            items = record.history.item
            history.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return read


def leveldb_records(content: bytes, start: int, block: int = 32768) -> Iterator[bytes]:
    """Yield the records of a file in LevelDB's log format, with `start` bytes of another header in its first block."""
    position, parts = start, b""
    while position + 7 <= len(content):
        if block - position % block < 7:  # too little room for a header: padding
            position += block - position % block
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def test_comet_offline(tmp_path: Path, pictures: list[Path]) -> None:
    pytest.importorskip("comet_ml")
    run_script(tmp_path, "comet_ml", COMET_START_ONLINE="0", COMET_API_KEY="comet_key_comet_key")
    (archive,) = (tmp_path / "logs").glob("*.zip")
    with zipfile.ZipFile(archive) as stored:
        experiment = json.loads(stored.read("experiment.json"))
        messages = [json.loads(line) for line in stored.read("messages.json").splitlines()]
        files = {name: stored.read(name) for name in stored.namelist()}
    assert experiment["project_name"] == "circles"
    assert experiment["offline_id"] == (tmp_path / "logs/comet_ml_id.txt").read_text()
    payloads = {kind: [m["payload"] for m in messages if m["type"] == kind] for kind in {m["type"] for m in messages}}
    losses = [p["metric"] for p in payloads["metric_msg"] if p["metric"]["metricName"] == "loss"]
    assert [(metric["step"], metric["metricValue"]) for metric in losses] == [(1, 0.1), (2, 0.2)]
    parameters = {p["param"]["paramName"]: p["param"]["paramValue"] for p in payloads["parameter_msg"] if "param" in p}
    assert parameters["learning_rate"] == 1e-5
    images = payloads["file_upload"]
    assert [image["additional_params"]["figName"] for image in images] == ["validation/pair-00", "validation/pair-01"]
    for image, picture in zip(images, pictures, strict=True):
        assert files[Path(image["file_path"]).name] == picture.read_bytes()
        assert image["additional_params"]["step"] == 1
        assert image["metadata"] == {"prompt": "red circle"}


class Broken(trackers.Tracker):
    """Works until step 2."""

    def __init__(self, run: trackers.Run):
        if run.name == "unopenable":
            raise SystemExit(1)

    def scalars(self, step: int, values: Any) -> None:
        if step >= 2:
            raise ConnectionError("the server is away")

    def images(self, step: int, key: str, paths: Any, caption: str) -> None:
        raise AssertionError("used after it failed")

    close = images  # type: ignore[assignment]


def test_a_tracker_that_fails_is_reported_once_and_dropped(
    tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(trackers._KINDS, "wandb", Broken)
    opened = open_trackers(reporting_to("wandb,tensorboard", tmp_path / "r"), {})
    for step in (1, 2, 3):
        opened.scalars(step, {"loss": 1.0})
    opened.images(3, "validation/pair-00", pictures[:1], "red circle")
    assert opened.names == ("tensorboard",)
    opened.close()
    assert [record.getMessage() for record in caplog.records] == [
        "wandb failed (ConnectionError: the server is away); the run goes on without it"
    ]
    assert [event.step for event in events(tmp_path / "r/logs/p").Scalars("loss")] == [1, 2, 3]

    unopenable = reporting_to("wandb,tensorboard", tmp_path / "unopenable")
    assert open_trackers(unopenable, {}).names == ("tensorboard",)
    assert "wandb failed (SystemExit: 1); the run goes on without it" in caplog.text
    (tmp_path / "file").touch()
    assert open_trackers(reporting_to("tensorboard", tmp_path, logging_dir="file"), {}).names == ()


def test_a_tracker_that_fails_costs_a_run_nothing(tiny_settings: dict[str, Any]) -> None:
    """W&B itself, with a key that it refuses; the run says so in its log, and TensorBoard has all of it."""
    pytest.importorskip("wandb")
    settings, key = tiny_settings | {"max_train_steps": 2, "report_to": "wandb,tensorboard"}, "tooshort-1234"
    done = subprocess.run(
        [sys.executable, "-m", "raycontrolnet", "train", *flags(settings)],
        env=os.environ | {"WANDB_MODE": "online", "WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:9"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    out = Path(settings["output_dir"])
    (line,) = [line for line in (out / "run.log").read_text().splitlines() if "wandb failed (" in line]
    assert "API" in line
    assert line.endswith("; the run goes on without it")
    assert not [path for path in out.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]
    assert key not in done.stdout + done.stderr
    assert [event.step for event in events(out / "logs" / "train_controlnet").Scalars("loss")] == [1, 2]


def test_no_trackers(tmp_path: Path, pictures: list[Path]) -> None:
    opened = open_trackers(reporting_to("none", tmp_path), {})
    opened.scalars(1, {"loss": 1.0})
    opened.images(1, "key", pictures, "caption")
    opened.close()
    assert not (tmp_path / "logs").exists()
