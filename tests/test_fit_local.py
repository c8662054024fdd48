"""Whole runs in this process: what they leave, that they go on as if they had not stopped, and what each flag does."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from fused_stand_ins import use_stand_ins
from PIL import Image
from reference import normalize, to_tensor, write_trained_controlnet
from runs import WEIGHTS, Settings, column, equal, lines, losses, metadata, run, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from raycontrolnet import RunResult, TrainConfig, fit, train_controlnet
from raycontrolnet.cluster import worker
from raycontrolnet.config.train_config import public_settings
from raycontrolnet.data.order import SampleOrder
from raycontrolnet.data.transforms import resize_and_crop
from raycontrolnet.demo.shapes import write_shapes
from raycontrolnet.errors import ConfigError, Interrupted, RunError, UserError
from raycontrolnet.latents import encoder
from raycontrolnet.launch import running
from raycontrolnet.model import batch as batch_module
from raycontrolnet.model import step, vae
from raycontrolnet.model.fused.layers import use_fused_layers
from raycontrolnet.model.performance import fused_layers
from raycontrolnet.report.progress import Progress, progress
from raycontrolnet.report.run_report import write_report
from raycontrolnet.sampling import images
from raycontrolnet.training import diagnosis, step_inputs
from raycontrolnet.training.run_marks import STOP_FILE
from raycontrolnet.training.status import live_status, read_status
from raycontrolnet.training.timings import write_timings

COMPARED = ("step", "loss", "lr", "grad_norm", "samples")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(scope="module")
def captions(circles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the circles with three captions a row."""
    folder = tmp_path_factory.mktemp("captions") / "data"
    shutil.copytree(circles, folder)
    rows = metadata(folder)
    for row in rows:
        row["text"] = [row["text"], "a circle", f"{row['text']}, drawn"]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# --- what a run leaves ---


def test_what_a_run_leaves(
    tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The contract, for a run whose paths are relative."""
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(tiny_settings["train_data_dir"])
    config = TrainConfig(
        **tiny_settings | {"output_dir": "runs/out", "train_data_dir": "data", "hub_token": "hf_Secret"}
    )
    stream = io.StringIO()
    result = fit(config, stream=stream)
    out = tmp_path / "runs" / "out"

    assert isinstance(result, RunResult)
    assert (result.output_dir, result.step, result.samples) == (out, 4, 16)
    assert (result.checkpoint, result.hub_url) == (out / "checkpoint-4", None)
    assert result.loss == losses(out)[-1]
    assert 0 < sum(result.timings.values()) <= result.seconds + 1
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    checkpoint = {"controlnet/config.json", f"controlnet/{WEIGHTS}", "training_state.pt", "manifest.json"}
    assert files == {
        "config.json", WEIGHTS, "README.md", "config.yaml", "metrics.jsonl", "report.html", "run.json", "run.log",
        *(f"checkpoint-{step}/{name}" for step in (2, 4) for name in checkpoint),
    }  # fmt: skip

    assert equal(weights(out), load_file(out / "checkpoint-4" / "controlnet" / WEIGHTS))
    assert not equal(weights(out), load_file(out / "checkpoint-2" / "controlnet" / WEIGHTS))
    assert (out / "config.json").read_text() == (out / "checkpoint-4" / "controlnet" / "config.json").read_text()

    records = lines(out / "metrics.jsonl")
    assert [(line["step"], line["samples"]) for line in records] == [(1, 4), (2, 8), (3, 12), (4, 16)]
    for line in records:
        assert {"loss", "lr", "images_per_second"} <= line.keys()
        assert line["loss"] == torch.tensor(line["loss"], dtype=torch.float32).item(), "at full precision"
        assert line["images_per_second"] > 0

    status = json.loads((out / "run.json").read_text())
    assert (status["status"], status["step"], status["samples"]) == ("finished", 4, 16)
    assert status["loss"] == result.loss
    assert status["checkpoint"] == "checkpoint-4"
    assert (status["num_workers"], status["processes"], status["latents_cache"]) == (0, 1, None)
    assert status["timings"] == result.timings
    assert status["timings"].keys() >= {"model_s", "step_s", "checkpoint_s"}
    for package in ("raycontrolnet", "ray", "torch", "diffusers"):
        assert __import__(package).__version__.startswith(status["versions"][package])

    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings.pop("output_dir") == str(out)
    assert settings.pop("train_data_dir") == tiny_settings["train_data_dir"]
    assert "hub_token" not in settings
    expected = public_settings(config)
    assert settings == {name: expected[name] for name in settings}
    assert not [path for path in out.rglob("*") if path.is_file() and b"hf_Secret" in path.read_bytes()]

    said = stream.getvalue()
    assert "13 samples, 1 worker on CPUs x batch 4 x accumulation 1, updates 0 to 4, seed 0" in said
    assert "step 4/4 | loss " in said
    assert f"4 updates; weights in {out}" in said
    assert capfd.readouterr().out == ""


def test_config_yaml_repeats_the_run(tiny_settings: Settings, out: Path, tmp_path: Path) -> None:
    """A seed that was not given is drawn and written down."""
    del tiny_settings["seed"]
    run(tiny_settings, out)
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert isinstance(settings["seed"], int)
    again = run(settings, tmp_path / "again")
    assert losses(again) == losses(out)
    other = run(tiny_settings, tmp_path / "other")
    assert yaml.safe_load((other / "config.yaml").read_text())["seed"] != settings["seed"]
    assert losses(other) != losses(out)


def test_the_weights_drive_a_pipeline(tiny_settings: Settings, tiny_base: Path, out: Path) -> None:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    run(tiny_settings, out, learning_rate=1e-2)
    images = []
    for folder in (out, out / "checkpoint-2" / "controlnet"):
        controlnet = ControlNetModel.from_pretrained(folder)
        assert {value.dtype for value in controlnet.parameters()} == {torch.float32}
        pipeline = StableDiffusionControlNetPipeline.from_pretrained(tiny_base, controlnet=controlnet)
        pipeline.set_progress_bar_config(disable=True)
        (image,) = pipeline(
            "red circle",
            image=Image.new("RGB", (32, 32), "white"),
            num_inference_steps=4,
            generator=torch.Generator().manual_seed(0),
        ).images
        assert image.size == (32, 32)
        images.append(np.asarray(image))
    assert not np.array_equal(images[0], images[1])


def test_a_second_run_into_the_folder_is_refused(tiny_settings: Settings, out: Path) -> None:
    run(tiny_settings, out, max_train_steps=2)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"holds checkpoint-2 .* add --resume_from_checkpoint latest.*another --outp"):
        run(tiny_settings, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


# --- resume ---

RESUMED: dict[str, Settings] = {
    "plain": {},  # 13 rows, batch 4: update 2 is within the first epoch, update 4 goes over its end
    "accumulation": {"gradient_accumulation_steps": 2},  # update 2 goes over the end, update 4 over that of the second
    "draws of prompts": {"proportion_empty_prompts": 0.5},
    "a curve": {"lr_scheduler": "cosine", "lr_warmup_steps": 1, "max_grad_norm": 0.05},
    "a subset": {"max_train_samples": 5, "train_batch_size": 3},
    "bf16": {"mixed_precision": "bf16", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", RESUMED)
def test_resume_is_exact(case: str, tiny_settings: Settings, captions: Path, tmp_path: Path) -> None:
    """From 2 to 4 as if it had never stopped: weights, losses, and the state for what comes after."""
    settings = tiny_settings | RESUMED[case] | {"train_data_dir": str(captions)}
    straight = run(settings, tmp_path / "straight")
    elsewhere = run(settings, tmp_path / "elsewhere", resume_from_checkpoint=str(straight / "checkpoint-2"))
    stopped = tmp_path / "stopped"
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoint-4")
    (stopped / WEIGHTS).unlink()
    run(settings, stopped, resume_from_checkpoint="latest")

    expected = [[line[name] for name in COMPARED] for line in lines(straight / "metrics.jsonl")]
    assert len({line[1] for line in expected}) == 4, "losses that differ"
    assert [[line[name] for name in COMPARED] for line in lines(stopped / "metrics.jsonl")] == expected
    assert [[line[name] for name in COMPARED] for line in lines(elsewhere / "metrics.jsonl")] == expected[2:]
    states = []
    for output_dir in (straight, stopped, elsewhere):
        assert equal(weights(output_dir), weights(straight))
        states.append(torch.load(output_dir / "checkpoint-4" / "training_state.pt", weights_only=True))
        assert json.loads((output_dir / "checkpoint-4" / "manifest.json").read_text())["samples"] == expected[-1][-1]
    for state in states[1:]:
        for number, moments in states[0]["optimizer"]["state"].items():
            assert equal(moments, state["optimizer"]["state"][number])
        assert state["lr_scheduler"]["last_epoch"] == 4


def test_resume_of_a_run_that_was_to_end_at_two(tiny_settings: Settings, tmp_path: Path) -> None:
    """By name; and once more when there is nothing left to do."""
    straight = run(tiny_settings, tmp_path / "straight")
    stopped = run(tiny_settings, tmp_path / "stopped", max_train_steps=2)
    assert losses(stopped) == losses(straight)[:2]
    run(tiny_settings, stopped, resume_from_checkpoint="checkpoint-2")
    assert losses(stopped) == losses(straight)
    assert equal(weights(stopped), weights(straight))
    before = weights(stopped)
    result = fit(TrainConfig(**tiny_settings | {"output_dir": str(stopped), "resume_from_checkpoint": "latest"}))
    assert (result.step, result.loss) == (4, None)
    assert column(stopped, "step") == [1, 2, 3, 4]
    assert equal(weights(stopped), before)


def test_going_back_replaces_the_metrics(tiny_settings: Settings, out: Path) -> None:
    run(tiny_settings, out)
    before = losses(out)
    run(tiny_settings, out, resume_from_checkpoint="checkpoint-2", learning_rate=1e-2)
    assert column(out, "step") == [1, 2, 3, 4]
    assert losses(out)[:3] == before[:3], "the third update's loss is that of checkpoint-2's weights"
    assert losses(out)[3] != before[3]


def test_resume_with_other_optimizer_settings(tiny_settings: Settings, out: Path) -> None:
    """A diverged run is told to go on with a lower learning rate."""
    run(tiny_settings, out, max_train_steps=2)
    changed = {"learning_rate": 1e-4, "adam_beta1": 0.5, "adam_weight_decay": 0.5, "resume_from_checkpoint": "latest"}
    run(tiny_settings, out, **changed)
    assert column(out, "lr") == [1e-3, 1e-3, 1e-4, 1e-4]
    state = torch.load(out / "checkpoint-4" / "training_state.pt", weights_only=True)
    (group,) = state["optimizer"]["param_groups"]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-4, (0.5, 0.999), 0.5)


def test_a_longer_run_goes_on_with_its_own_curve(tiny_settings: Settings, out: Path) -> None:
    curve = {"lr_scheduler": "linear", "lr_warmup_steps": 0, "learning_rate": 1.0e-3}
    run(tiny_settings, out, max_train_steps=2, **curve)
    run(tiny_settings, out, resume_from_checkpoint="latest", **curve)
    assert column(out, "lr") == pytest.approx([1e-3, 0.5e-3, 0.5e-3, 0.25e-3])


def test_progress_of_a_run_that_goes_back(tmp_path: Path) -> None:
    """Its metrics file is cut, and soon longer than before: that is no reason for the run to fail."""

    def records(*steps: int, loss: float) -> str:
        record = {"loss": loss, "lr": 1e-3, "images_per_second": 1.0, "time": 0.0}
        return "".join(json.dumps({"step": step, "samples": 4 * step} | record) + "\n" for step in steps)

    path = tmp_path / "metrics.jsonl"
    path.write_text(records(1, 2, 3, 4, loss=0.123456))
    stream = io.StringIO()
    with progress(Progress(tmp_path, 9, 2, stream)):
        (tmp_path / "new").write_text(records(1, 2, loss=0.5) + records(3, 4, 5, 6, 7, loss=0.25))
        (tmp_path / "new").replace(path)
    assert stream.getvalue().splitlines()[-1].startswith("step 7/9 | loss 0.2500 | lr 0.001 | ")


# --- flags ---


def test_rows_are_the_data_sets_in_order(tiny_settings: Settings, circles: Path, out: Path, seen: Any) -> None:
    """Sample k is the row that the order says, with its own images and caption: over the end of the epoch."""
    run(tiny_settings, out)
    order = SampleOrder(13, seed=0)
    rows = metadata(circles)
    samples = [row for batch in seen for row in batch]
    assert [sample.sample_index for sample in samples] == list(range(16))
    assert [len(batch) for batch in seen] == [4] * 4
    for k, sample in enumerate(samples):
        row = rows[order.row(k)]
        assert sample.prompt == row["text"]
        for name in ("image", "conditioning_image"):
            expected = resize_and_crop(Image.open(circles / row[name]), 32)
            assert np.array_equal(getattr(sample, name), expected)


def test_pixels_reach_the_models_in_their_ranges(
    tiny_settings: Settings, out: Path, seen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images in [-1, 1], conditioning images in [0, 1]."""
    from diffusers import AutoencoderKL, ControlNetModel

    given: dict[str, Tensor] = {}
    encode, forward = AutoencoderKL.encode, ControlNetModel.forward

    def recording_encode(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        given["image"] = x
        return encode(self, x, *args, **options)

    def recording_forward(self: Any, *args: Any, **options: Any) -> Any:
        given["conditioning_image"] = options["controlnet_cond"]
        return forward(self, *args, **options)

    monkeypatch.setattr(AutoencoderKL, "encode", recording_encode)
    monkeypatch.setattr(ControlNetModel, "forward", recording_forward)
    run(tiny_settings, out, max_train_steps=1)
    images, conditioning = (np.stack([getattr(row, name) for row in seen[0]]) for name in given)
    torch.testing.assert_close(given["image"], normalize(to_tensor(images)), rtol=0, atol=1e-6)
    torch.testing.assert_close(given["conditioning_image"], to_tensor(conditioning), rtol=0, atol=1e-6)


def test_resolution_and_batch_size(tiny_settings: Settings, out: Path, seen: Any) -> None:
    run(tiny_settings, out, resolution=16, train_batch_size=3, max_train_steps=2)
    assert [len(batch) for batch in seen] == [3, 3]
    assert {row.image.shape for batch in seen for row in batch} == {(16, 16, 3)}
    assert {row.conditioning_image.shape for batch in seen for row in batch} == {(16, 16, 3)}


@pytest.mark.parametrize("proportion", [0, 0.5, 1])
def test_proportion_empty_prompts(proportion: float, tiny_settings: Settings, out: Path, seen: Any) -> None:
    run(tiny_settings, out, proportion_empty_prompts=proportion, train_batch_size=20, max_train_steps=2)
    empty = sum(row.prompt == "" for batch in seen for row in batch)
    assert empty == 40 * proportion if proportion in (0, 1) else 8 < empty < 32


def test_every_caption_is_used(tiny_settings: Settings, captions: Path, out: Path, seen: Any) -> None:
    run(tiny_settings, out, train_data_dir=str(captions), train_batch_size=20, max_train_steps=2)
    prompts = [row.prompt for batch in seen for row in batch]
    assert 4 < prompts.count("a circle") < 25
    assert 4 < sum(prompt.endswith(", drawn") for prompt in prompts) < 25


def test_max_train_samples(tiny_settings: Settings, out: Path, seen: Any) -> None:
    run(tiny_settings, out, max_train_samples=5, max_train_steps=None, num_train_epochs=2)
    assert column(out, "step") == [1, 2, 3, 4], "2 epochs of 5 samples in batches of 4"
    samples = [row.image.tobytes() for batch in seen for row in batch]
    assert len(set(samples[:5])) == len(set(samples[5:10])) == len(set(samples)) == 5


@pytest.mark.parametrize(("accumulation", "updates"), [(1, 12), (3, 6)])
def test_num_train_epochs(accumulation: int, updates: int, tiny_settings: Settings, out: Path, seen: Any) -> None:
    """Updates per epoch = ceil(ceil(13 / 4) / accumulation)."""
    changed = {"max_train_steps": None, "num_train_epochs": 3, "gradient_accumulation_steps": accumulation}
    run(tiny_settings, out, **changed)
    assert column(out, "step") == list(range(1, updates + 1))
    assert len(seen) == updates * accumulation


def test_accumulation_is_a_larger_batch(tiny_settings: Settings, out: Path, tmp_path: Path) -> None:
    small = run(tiny_settings, out, gradient_accumulation_steps=3, train_batch_size=2)
    large = run(tiny_settings, tmp_path / "large", train_batch_size=6)
    assert losses(small) == pytest.approx(losses(large), abs=1e-5)
    assert column(small, "grad_norm") == pytest.approx(column(large, "grad_norm"), rel=1e-3)
    assert column(small, "samples") == column(large, "samples") == [6, 12, 18, 24]


def test_gradient_checkpointing_learns_the_same(tiny_settings: Settings, out: Path, tmp_path: Path) -> None:
    plain, saved = run(tiny_settings, out), run(tiny_settings, tmp_path / "saved", gradient_checkpointing=True)
    assert losses(saved) == pytest.approx(losses(plain), abs=1e-6)


def test_mixed_precision(tiny_settings: Settings, out: Path, tmp_path: Path) -> None:
    plain, mixed = run(tiny_settings, out), run(tiny_settings, tmp_path / "mixed", mixed_precision="bf16")
    assert losses(mixed) == pytest.approx(losses(plain), rel=0.02)
    assert losses(mixed) != losses(plain)
    assert {value.dtype for value in weights(mixed).values()} == {torch.float32}
    with pytest.raises(ConfigError, match="--mixed_precision=fp16: needs a GPU; use bf16 or no on the CPU"):
        run(tiny_settings, tmp_path / "fp16", mixed_precision="fp16")


@pytest.mark.parametrize("allowed", [False, True])
def test_allow_tf32(allowed: bool, tiny_settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Governs matrix products and convolutions of a step, whatever PyTorch's defaults; never those of the cache."""
    seen: dict[str, set[tuple[bool, bool]]] = {"step": set(), "cache": set()}
    before = tf32_allowed()

    def noting(of: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seen[of].add(tf32_allowed())
        return original(*args, **kwargs)

    monkeypatch.setattr(train_controlnet, "train_step", partial(noting, "step", step.train_step))
    monkeypatch.setattr(encoder, "encode_images", partial(noting, "cache", vae.encode_images))
    cache = {"cache_latents": "on", "latents_cache_dir": str(out.with_name("latents"))}
    run(tiny_settings, out, allow_tf32=allowed, max_train_steps=1, **cache)
    assert seen == {"step": {(allowed, allowed)}, "cache": {(False, False)}}
    assert tf32_allowed() == before, "the process is left as it was"


NEWER = ("fp32_precision", "cuda.matmul.fp32_precision", "cudnn.fp32_precision", "cudnn.conv.fp32_precision",
         "cudnn.rnn.fp32_precision")  # fmt: skip
PRECISIONS = [f'torch.backends.{name} = "{value}"' for name in NEWER for value in ("ieee", "tf32")]
SEEN = """
import torch
kinds = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn

def read(setting):
    try:
        return setting()
    except RuntimeError:
        return "not read"

def seen():
    older = (lambda: torch.backends.cuda.matmul.allow_tf32, lambda: torch.backends.cudnn.allow_tf32)
    return [kind.fp32_precision for kind in kinds] + [
        read(each) for each in (*older, torch.get_float32_matmul_precision)
    ]
"""


def test_tf32_beside_the_newer_settings() -> None:
    """Each in a process of its own, as they cannot be undone: after them PyTorch does not read the flags."""
    settings = ["", *PRECISIONS, "torch.set_float32_matmul_precision('medium')"]
    code = f"""{SEEN}
import os
from raycontrolnet.model.performance import tf32

def check(setting):
    exec(setting)
    before, products = seen(), kinds[0].fp32_precision
    for allowed in (False, True):
        with tf32(allowed=allowed):
            of_kinds = [kind.fp32_precision for kind in kinds]
            assert of_kinds == ["tf32"] * 3 if allowed else "tf32" not in of_kinds, (setting, of_kinds)
        assert seen() == before, (setting, seen(), before)
    torch.backends.cudnn.fp32_precision = "ieee"
    assert kinds[0].fp32_precision == (products if "matmul" in setting else "ieee"), (setting, "was inherited")

failed = 0
for setting in {settings!r}:
    if (child := os.fork()) == 0:
        check(setting)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
assert not failed, failed
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fit_after_the_newer_settings(tiny_settings: Settings, out: Path) -> None:
    settings = tiny_settings | {"output_dir": str(out), "num_workers": 0, "max_train_steps": 1}
    code = f"""{SEEN}
from raycontrolnet import TrainConfig, fit
torch.backends.cudnn.conv.fp32_precision = "ieee"
before = seen()
fit(TrainConfig(**{settings!r}))
assert seen() == before, (seen(), before)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def tf32_allowed() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_learning_rate_and_max_grad_norm(tiny_settings: Settings, tiny_base: Path, out: Path, tmp_path: Path) -> None:
    start = write_trained_controlnet(tiny_base, tmp_path / "start")
    settings = tiny_settings | {"controlnet_model_name_or_path": str(start), "max_train_steps": 1}
    still = run(settings, out, learning_rate=0)
    assert equal(weights(still), load_file(start / WEIGHTS))
    # A gradient clipped to next to nothing leaves the weight decay of the first update, and epsilon sees to the rest.
    clipped = run(settings, tmp_path / "clipped", max_grad_norm=1e-12, adam_weight_decay=0, adam_epsilon=1)
    for name, value in weights(clipped).items():
        torch.testing.assert_close(value, weights(still)[name], rtol=0, atol=1e-9)
    moved = run(settings, tmp_path / "moved", adam_weight_decay=0, adam_epsilon=1)
    assert any((value - weights(still)[name]).abs().max() > 1e-6 for name, value in weights(moved).items())


def test_columns(tiny_settings: Settings, circles: Path, out: Path, tmp_path: Path, seen: Any) -> None:
    data = shutil.copytree(circles, tmp_path / "data")
    text = (data / "metadata.jsonl").read_text()
    for old, new in (('"image"', '"photo"'), ('"conditioning_image"', '"edges"'), ('"text"', '"says"')):
        text = text.replace(old, new)
    (data / "metadata.jsonl").write_text(text)
    names = {"image_column": "photo", "conditioning_image_column": "edges", "caption_column": "says"}
    run(tiny_settings, out, train_data_dir=str(data), **names)
    plain = run(tiny_settings, tmp_path / "plain")
    assert losses(out) == losses(plain)
    with pytest.raises(ConfigError, match=r"--image_column=picture: no such column .* which has: photo, edges, says"):
        run(tiny_settings, tmp_path / "bad", train_data_dir=str(data), **names | {"image_column": "picture"})


def test_dataset_name(tiny_settings: Settings, circles: Path, out: Path, tmp_path: Path) -> None:
    """A folder with metadata, and a parquet file with the images in it: read through `datasets`, into cache_dir."""
    import datasets

    plain = run(tiny_settings, out)
    settings = tiny_settings | {"train_data_dir": None}
    folder = run(settings, tmp_path / "folder", dataset_name=str(circles))
    assert losses(folder) == losses(plain)

    rows = metadata(circles)
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
    for name in ("image", "conditioning_image"):
        columns[name] = [{"bytes": (circles / path).read_bytes(), "path": None} for path in columns[name]]
    features = datasets.Features(
        {"image": datasets.Image(), "conditioning_image": datasets.Image(), "text": datasets.Value("string")}
    )
    parquet = tmp_path / "data" / "train.parquet"
    parquet.parent.mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(parquet)
    cache = tmp_path / "cache"
    by_parquet = run(settings, tmp_path / "by_parquet", dataset_name=str(parquet.parent), cache_dir=str(cache))
    assert losses(by_parquet) == losses(plain)
    assert list(cache.rglob("*.arrow"))


def test_tokenizer_name(tiny_settings: Settings, tiny_base: Path, out: Path, tmp_path: Path) -> None:
    plain = run(tiny_settings, out)
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "tokenizer").rename(tmp_path / "tokenizer")
    settings = tiny_settings | {"pretrained_model_name_or_path": str(base)}
    named = run(settings, tmp_path / "named", tokenizer_name=str(tmp_path / "tokenizer"))
    assert losses(named) == losses(plain)
    with pytest.raises(
        UserError, match=rf"--pretrained_model_name_or_path={base}: has no tokenizer; add that folder, or"
    ):
        run(settings, tmp_path / "without")
    with pytest.raises(UserError, match=rf"--tokenizer_name={tmp_path}: name the folder tokenizer in it"):
        run(settings, tmp_path / "wrong", tokenizer_name=str(tmp_path))
    # another one gives other tokens, and so other losses
    vocabulary = json.loads((tmp_path / "tokenizer" / "vocab.json").read_text())
    words = [word for word in vocabulary if not word.startswith("<|")]
    turned = dict(zip(words, [vocabulary[word] for word in reversed(words)], strict=True))
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary | turned))
    other = run(settings, tmp_path / "other", tokenizer_name=str(tmp_path / "tokenizer"))
    assert losses(other) != losses(plain)


@pytest.fixture
def hub_cache(tiny_base: Path, tiny_base_v: Path, tmp_path: Path) -> Path:
    """Write what downloads leave: main, and the revision v2 (predicts the velocity, files in half precision)."""
    model = tmp_path / "hub" / "models--someone--tiny"
    (model / "refs").mkdir(parents=True)
    for revision, commit, base in (("main", "a" * 40, tiny_base), ("v2", "b" * 40, tiny_base_v)):
        (model / "refs" / revision).write_text(commit)
        shutil.copytree(base, model / "snapshots" / commit)
    for path in (model / "snapshots" / ("b" * 40)).rglob("*.safetensors"):
        half = {name: value.half() for name, value in load_file(path).items()}
        save_file(half, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        path.unlink()
    return tmp_path / "hub"


@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks:UserWarning")  # diffusers' and the Hub library's affair
def test_hub_id_revision_variant_and_cache_dir(
    tiny_settings: Settings, tiny_base_v: Path, hub_cache: Path, out: Path, tmp_path: Path
) -> None:
    """A model of the Hub that was downloaded to cache_dir."""
    plain = run(tiny_settings, out)
    hub = tiny_settings | {"pretrained_model_name_or_path": "someone/tiny", "cache_dir": str(hub_cache)}
    main = run(hub, tmp_path / "main")
    assert losses(main) == losses(plain)
    plain_v = run(tiny_settings, tmp_path / "plain_v", pretrained_model_name_or_path=str(tiny_base_v))
    half = run(hub, tmp_path / "half", revision="v2", variant="fp16")
    assert losses(half) == pytest.approx(losses(plain_v), rel=1e-2)
    assert losses(half) != pytest.approx(losses(plain), rel=1e-2)
    with pytest.raises(UserError, match=r"--pretrained_model_name_or_path=someone/tiny: cannot be loaded \(unet\)"):
        run(hub, tmp_path / "no_such_files", revision="v2")
    with pytest.raises(ConfigError, match=r"--pretrained_model_name_or_path=someone/tiny: no such folder, and, as a"):
        run(hub, tmp_path / "elsewhere", cache_dir=str(tmp_path / "empty"))


def test_tensorboard(tiny_settings: Settings, out: Path) -> None:
    """Under logging_dir, under output_dir; in the folder of tracker_project_name."""
    run(tiny_settings, out, report_to="tensorboard", logging_dir="my/logs", tracker_project_name="circles")
    files = [path for path in out.rglob("events.out.*") if path.is_file()]
    assert files
    assert all(path.is_relative_to(out / "my" / "logs" / "circles") for path in files)
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]

    read = event_accumulator.EventAccumulator(str(out / "my" / "logs" / "circles")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [
        (line["step"], pytest.approx(line["loss"])) for line in lines(out / "metrics.jsonl")
    ]
    assert [event.value for event in read.Scalars("lr")] == pytest.approx(column(out, "lr"))


# --- validation ---


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' UniPC and numpy 2
def test_validation(tiny_settings: Settings, tiny_base: Path, circles: Path, out: Path, tmp_path: Path) -> None:
    """Images at validation_steps and at the end; the training does not notice."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UniPCMultistepScheduler

    controls = [str(circles / "conditioning" / f"0000{i}.png") for i in (0, 1)]
    changed = {
        "validation_prompt": ("red circle",), "validation_image": tuple(controls), "num_validation_images": 1,
        "validation_steps": 2, "proportion_empty_prompts": 0.5, "report_to": "tensorboard",
    }  # fmt: skip
    run(tiny_settings, out, **changed, max_train_steps=5)
    plain = run(tiny_settings, tmp_path / "plain", proportion_empty_prompts=0.5, max_train_steps=5)
    assert losses(out) == losses(plain)
    assert equal(weights(out), weights(plain))

    folders = sorted((out / "validation").iterdir())
    assert [folder.name for folder in folders] == ["step-000002", "step-000004", "step-000005"]
    assert not (plain / "validation").exists()
    drawn = []
    for folder in folders:
        found = metadata(folder)
        assert [(line["prompt"], line["control_image"]) for line in found] == [
            ("red circle", control) for control in controls
        ]
        assert {(line["num_inference_steps"], line["scheduler"]) for line in found} == {(20, "UniPCMultistepScheduler")}
        drawn.append([np.asarray(Image.open(folder / line["file_name"])) for line in found])
        assert {image.shape for image in drawn[-1]} == {(32, 32, 3)}
    assert not np.array_equal(drawn[0][0], drawn[2][0])

    # the last ones are of the saved weights
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        tiny_base, controlnet=ControlNetModel.from_pretrained(out)
    )
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    seed = json.loads((folders[-1] / "metadata.jsonl").read_text().splitlines()[0])["seed"]
    (image,) = pipeline(
        "red circle", Image.open(controls[0]), num_inference_steps=20, generator=torch.Generator().manual_seed(seed)
    ).images
    assert np.abs(np.asarray(image).astype(int) - drawn[-1][0]).max() <= 1


def test_validation_images_are_looked_at_first(tiny_settings: Settings, out: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"--validation_image: .*broken.png is not an image"):
        run(tiny_settings, out, validation_prompt=("red",), validation_image=(str(broken),))
    assert not list(out.glob("checkpoint-*"))


# --- failures ---


def test_a_corrupt_image(tiny_settings: Settings, out: Path, tmp_path: Path) -> None:
    """Named; the updates before it are kept; mended, the run ends as if nothing had been."""
    data = write_shapes(tmp_path / "data", 13, resolution=32)
    settings = tiny_settings | {"train_data_dir": str(data), "checkpointing_steps": 100, "max_train_steps": 5}
    straight = run(settings, tmp_path / "straight")
    row = SampleOrder(13, seed=0).row(9)  # of the third update
    image = data / "images" / f"{row:05}.png"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as error:
        run(settings, out)
    message = str(error.value)
    assert f"metadata.jsonl:{row + 1}, image: " in message
    assert f"{image.name} is broken or truncated" in message
    assert "\nfix the data; --cache_latents on names all such images before training, and --on_bad_sample" in message
    assert "The checkpoint of update 2 stands: go on with --resume_from_checkpoint latest" in message
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert losses(out) == losses(straight)[:2]
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    assert not (out / WEIGHTS).exists()

    with pytest.raises(UserError, match=f"{image.name} is broken or truncated"):
        run(settings, out, resume_from_checkpoint="latest")
    image.write_bytes(whole)
    run(settings, out, resume_from_checkpoint="latest")
    assert losses(out) == losses(straight)
    assert equal(weights(out), weights(straight))
    assert json.loads((out / "run.json").read_text())["status"] == "finished"


@pytest.fixture
def before_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[Any], None]], None]]:
    """before_step(act): `act(state)` runs before every training step."""
    train_step = step.train_step
    with monkeypatch.context() as patch:

        def install(act: Callable[[Any], None]) -> None:
            def acting_step(state: Any, *rest: Any) -> Any:
                act(state)
                return train_step(state, *rest)

            patch.setattr(train_controlnet, "train_step", acting_step)

        yield install


def test_the_layer_within_a_fused_block_is_named(
    tiny_settings: Settings, out: Path, before_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused blocks call none of the layers in them."""
    use_stand_ins(monkeypatch)
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)  # a stand-in's takes no nan
    damaged = "down_blocks.0.resnets.0.norm2"
    states = []

    def diverge(state: Any) -> None:
        states.append(state)
        use_fused_layers(state.components)
        with torch.no_grad():
            state.components.controlnet.get_submodule(damaged).weight.fill_(float("nan"))

    before_step(diverge)
    with pytest.raises(RunError) as error:
        run(tiny_settings, out)
    assert f"The first module whose output is not finite: controlnet.{damaged}." in str(error.value)
    assert fused_layers(states[0].components), "after that they are as they were"


def test_a_diverged_run(tiny_settings: Settings, out: Path, before_step: Any) -> None:
    """It fails at once, and no checkpoint holds its weights."""

    def diverge(state: Any) -> None:
        if state.step == 2:
            with torch.no_grad():
                state.components.controlnet.controlnet_mid_block.bias.fill_(float("nan"))

    before_step(diverge)
    with pytest.raises(RunError) as error:
        run(tiny_settings, out, checkpointing_steps=1)
    message = str(error.value)
    data = Path(tiny_settings["train_data_dir"]) / "metadata.jsonl"
    assert message.startswith(
        "The loss is nan at update 3 (learning rate 0.001), which was not taken. Training has diverged: lower "
        f"--learning_rate. The update's samples: {data}:"
    )
    assert message.count(f"{data}:") == 4
    assert "The first module whose output is not finite: controlnet.controlnet_mid_block" in message
    assert "The checkpoint of update 2 stands" in message
    assert column(out, "step") == [1, 2]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    for path in out.glob("checkpoint-*/controlnet"):
        assert all(value.isfinite().all() for value in weights(path).values())
    before_step(lambda state: None)
    run(tiny_settings, out, resume_from_checkpoint="latest", learning_rate=1e-4)
    assert column(out, "lr") == [1e-3, 1e-3, 1e-4, 1e-4]


def test_gradients_that_are_not_finite(tiny_settings: Settings, out: Path, before_step: Any) -> None:
    """The loss still is; the update is not taken."""
    states = []

    def spoil(state: Any) -> None:
        states.append(state)
        if state.step == 1:
            state.components.controlnet.controlnet_mid_block.bias.register_hook(lambda grad: grad * float("nan"))

    before_step(spoil)
    with pytest.raises(
        RunError, match=r"The gradient norm is nan at update 2 .*, which was not taken. Training has div"
    ):
        run(tiny_settings, out, checkpointing_steps=1)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    before = load_file(out / "checkpoint-1" / "controlnet" / WEIGHTS)
    assert equal(states[-1].components.controlnet.state_dict(), before)


@pytest.mark.parametrize("most", [1, 2])
def test_updates_that_are_not_finite_are_left_out(
    tiny_settings: Settings, out: Path, before_step: Any, most: int
) -> None:
    """The second and the third of four; more than --max_nan end the run."""
    hooks: list[Any] = []

    def spoil(state: Any) -> None:
        for hook in hooks:
            hook.remove()
        if state.step in (1, 2):
            bias = state.components.controlnet.controlnet_mid_block.bias
            hooks.append(bias.register_hook(lambda grad: grad * float("inf")))

    before_step(spoil)
    settings = tiny_settings | {"on_nan": "skip", "max_nan": most, "checkpointing_steps": 1}
    if most == 1:
        with pytest.raises(RunError, match=r"not taken\. .* More than --max_nan=1 such updates since the start"):
            run(settings, out)
        return
    result = fit(TrainConfig(**settings | {"output_dir": str(out)}), stream=(shown := io.StringIO()))
    assert result.step == 4
    assert re.findall(r"at update (\d) \(.*; left out, (\d) of at most 2", shown.getvalue()) == [("2", "1"), ("3", "2")]
    assert column(out, "step") == [1, 4]
    assert column(out, "samples") == [4, 16]
    assert "left out, 2 of at most 2" in (out / "run.log").read_text()
    first, second, third, fourth = (weights(out / f"checkpoint-{step}" / "controlnet") for step in range(1, 5))
    assert equal(first, second)
    assert equal(first, third)
    assert not equal(first, fourth)
    assert all(value.isfinite().all() for value in fourth.values())


def test_an_optimizer_that_is_not_fused(tiny_settings: Settings, out: Path, before_step: Any) -> None:
    """As bitsandbytes' AdamW8bit: no update with a gradient that is not finite either."""
    states = []

    def spoil(state: Any) -> None:
        states.append(state)
        for group in state.optimizer.param_groups:
            group["fused"] = False
        state.optimizer.optimizer._step_supports_amp_scaling = False
        if state.step == 1:
            state.components.controlnet.controlnet_mid_block.bias.register_hook(lambda grad: grad * float("nan"))

    before_step(spoil)
    with pytest.raises(RunError, match=r"The gradient norm is nan at update 2 .*, which was not taken"):
        run(tiny_settings, out, checkpointing_steps=1)
    assert equal(
        states[-1].components.controlnet.state_dict(), load_file(out / "checkpoint-1" / "controlnet" / WEIGHTS)
    )


@pytest.mark.parametrize("cache_latents", ["off", "on"])
def test_the_sample_that_is_not_finite_is_named(
    tiny_settings: Settings, out: Path, tmp_path: Path, cache_latents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text makes NaN; the others of its update do not."""
    data = write_shapes(tmp_path / "data", 8, resolution=32)
    rows = metadata(data)
    rows[5]["text"] = "a sample that spoils the update"
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_batch = batch_module.make_batch

    def spoiled(prepared: Any, *rest: Any) -> Any:
        batch = make_batch(prepared, *rest)
        bad = [row.prompt.startswith("a sample") for row in prepared]
        if any(bad):
            spoilt = torch.where(
                torch.tensor(bad)[:, None, None, None], float("nan"), batch.conditioning_images.float()
            )
            batch = batch._replace(conditioning_images=spoilt)
        return batch

    monkeypatch.setattr(step_inputs, "make_batch", spoiled)
    monkeypatch.setattr(diagnosis, "make_batch", spoiled)
    changes = {"train_data_dir": str(data), "cache_latents": cache_latents, "proportion_empty_prompts": 0.0}
    with pytest.raises(RunError) as error:
        run(tiny_settings, out, **changes)
    place = f"{data}/metadata.jsonl:6"
    where = ", from controlnet.controlnet_cond_embedding.conv_in on"
    assert f"The loss is not finite for {place}{where}, and is for the others: look at these, or" in str(error.value)


def test_a_vae_that_overflows(tiny_settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_images = vae.encode_images

    def overflowing(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = encode_images(model, images)
        return mean * float("inf"), logvar

    monkeypatch.setattr(step, "encode_images", overflowing)
    with pytest.raises(RunError) as error:
        run(tiny_settings, out)
    data = Path(tiny_settings["train_data_dir"]) / "metadata.jsonl"
    message = str(error.value)
    assert f"The VAE gives latents that are not finite in float32 for {data}:" in message
    assert "the VAE or these images are damaged; name another VAE with --pretrained_vae_model_name_or_path" in message
    assert "--cache_latents" not in message


def test_ctrl_c(tiny_settings: Settings, out: Path, tmp_path: Path, before_step: Any) -> None:
    straight = run(tiny_settings, tmp_path / "straight")

    def interrupt(state: Any) -> None:
        if state.step == 3:
            raise KeyboardInterrupt

    before_step(interrupt)
    with pytest.raises(Interrupted) as error:
        run(tiny_settings, out)
    assert str(error.value).startswith("Interrupted. The checkpoint of update 2 stands: go on with --resume_from_check")
    assert error.value.exit_code == 130
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    before_step(lambda state: None)
    run(tiny_settings, out, resume_from_checkpoint="latest")
    assert losses(out) == losses(straight)
    assert equal(weights(out), weights(straight))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals(tiny_settings: Settings, out: Path, tmp_path: Path, before_step: Any, number: signal.Signals) -> None:
    """The update is done, its checkpoint written; the run goes on as if nothing had been."""
    settings = tiny_settings | {"checkpointing_steps": 100}
    straight = run(settings, tmp_path / "straight")
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    before_step(lambda state: signal.raise_signal(number) if state.step == 2 else None)
    with pytest.raises(Interrupted) as error:
        run(settings, out)
    assert str(error.value).startswith("Interrupted. The checkpoint of update 3 stands: go on with --resume_from_check")
    assert error.value.exit_code == 128 + number
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert not (out / STOP_FILE).exists()
    before_step(lambda state: None)
    run(settings, out, resume_from_checkpoint="latest")
    assert losses(out) == losses(straight)
    assert equal(weights(out), weights(straight))


def test_a_signal_while_images_are_drawn(
    validated_settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of them is not waited for: there may be minutes of it."""
    drawn: list[images.ImageItem] = []
    write = images.write

    def interrupted(*given: Any) -> Iterator[images.ImageItem]:
        for item in write(*given):
            if not drawn:
                signal.raise_signal(signal.SIGTERM)
            drawn.append(item)
            yield item

    monkeypatch.setattr(images, "write", interrupted)
    with pytest.raises(Interrupted):
        run(validated_settings, out, checkpointing_steps=100)
    assert len(drawn) == 1
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_machine_that_is_to_be_reclaimed(tiny_settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One checkpoint at each notice; the run goes on."""
    told = iter([0, 0.5, 0, 0, 1, 0])  # 0.5: one of two workers knows
    monkeypatch.setattr(worker.ReclaimNotices, "ask_for_checkpoint", lambda self: next(told))
    run(tiny_settings, out, checkpointing_steps=100, max_train_steps=6)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]


def test_notices_ask_for_checkpoints_until_the_machine_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a notice, after the time that may be lost, at the next notice; not once no machine is going."""
    clock, going = 1000.0, 0
    monkeypatch.setattr(worker, "nodes_to_be_reclaimed", lambda: going)
    notices, asked = worker.ReclaimNotices(clock=lambda: clock), []
    for seconds, going in ((0, 0), (1, 1), (1, 1), (20, 1), (1, 1), (1, 2), (30, 0), (1, 1)):  # noqa: B007
        clock += seconds
        asked.append(notices.ask_for_checkpoint())
    assert asked == [False, True, False, True, False, True, False, True]


def test_a_process_of_its_own_asks_the_cluster_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looked = 1000.0, []

    def look() -> int:
        looked.append(clock)
        return int(clock >= 1004)

    monkeypatch.setattr(worker, "this_node_is_to_be_reclaimed", look)
    notices, asked = worker.ReclaimNotices(local=True, clock=lambda: clock), []
    for second in range(6):
        clock = 1000.0 + second
        asked.append(notices.ask_for_checkpoint())
    assert looked == [1000, 1002, 1004]
    assert asked == [False] * 4 + [True, False]


def test_a_closed_terminal(tiny_settings: Settings, out: Path, before_step: Any) -> None:
    """SIGHUP comes when nothing can be written to it any more."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    settings = tiny_settings | {"output_dir": str(out), "checkpointing_steps": 100}
    stream = io.StringIO()

    def close(state: Any) -> None:
        if state.step == 2:
            stream.write = Closed().write  # type: ignore[method-assign]
            signal.raise_signal(signal.SIGHUP)

    before_step(close)
    with pytest.raises(Interrupted) as error:
        fit(TrainConfig(**settings), stream=stream)
    assert error.value.exit_code == 129
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_second_signal_ends_the_run_at_once(tiny_settings: Settings, out: Path, before_step: Any) -> None:
    def interrupt(state: Any) -> None:
        if state.step == 3:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            time.sleep(30)

    before_step(interrupt)
    start = time.monotonic()
    with pytest.raises(Interrupted, match="The checkpoint of update 2 stands") as error:
        run(tiny_settings, out)
    assert time.monotonic() - start < 25
    assert error.value.exit_code == 143


def test_sigterm_leaves_the_end_as_long_as_its_sender_does(
    tiny_settings: Settings, out: Path, before_step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that it is not done yet, for whoever sends SIGKILL next, and writes the checkpoint if nobody does."""
    monkeypatch.setattr(running, "LOOK_S", 0.1)
    seen: list[str] = []
    stream = io.StringIO()

    def slow(state: Any) -> None:
        if state.step == 2:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(2)
            seen.append(json.loads((out / "run.json").read_text())["status"])

    before_step(slow)
    with pytest.raises(Interrupted, match="The checkpoint of update 3 stands") as error:
        fit(TrainConfig(**tiny_settings | {"output_dir": str(out)}), stream=stream)
    assert error.value.exit_code == 143
    assert seen == ["interrupted"]
    late = "still ending; if it is killed now, --resume_from_checkpoint latest goes on"
    assert stream.getvalue().count(late) == 1


def test_a_disk_without_room_for_the_checkpoints(
    tiny_settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before the first update, with what would help; a limit does."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=13_000_000, total=1))
    settings = tiny_settings | {"checkpointing_steps": 1}
    with pytest.raises(UserError) as error:
        run(settings, out)
    assert str(error.value).startswith(
        f"--output_dir={out}: 4 checkpoints of 4.73 MB and the weights need 20.5 MB, and 13 MB are free; keep fewer "
        "with --checkpoints_total_limit, or name another folder"
    )
    assert not (out / "metrics.jsonl").exists()
    run(settings, out, checkpoints_total_limit=1, max_train_steps=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=8_000_000, total=1))
    run(settings, out, checkpoints_total_limit=1, resume_from_checkpoint="latest")  # the old one makes room
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_signal_before_training(tiny_settings: Settings, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is waited for while models are read."""
    monkeypatch.setattr(train_controlnet, "build_state", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match=r"^Interrupted\. There was no checkpoint yet\.$"):
        run(tiny_settings, out)


def test_a_run_whose_process_was_killed(tiny_settings: Settings, out: Path) -> None:
    run(tiny_settings, out)
    status = json.loads((out / "run.json").read_text())
    assert read_status(out)["status"] == "finished"
    (out / "run.json").write_text(json.dumps(status | {"status": "running"}))
    assert read_status(out)["status"] == "running"
    status["process"]["process_started"] = "1"
    (out / "run.json").write_text(json.dumps(status | {"status": "running"}))
    assert read_status(out)["status"] == "interrupted"
    assert read_status(out)["cause"] == f"Process {os.getpid()} on {socket.gethostname()} was killed."
    write_report(out)
    page = (out / "report.html").read_text()
    assert "interrupted" in page
    assert ">running<" not in page


def test_an_error_that_nobody_foresaw(tiny_settings: Settings, out: Path, before_step: Any) -> None:
    """Its cause in one line; the traceback is in the log."""

    def fail(state: Any) -> None:
        raise LookupError("something\nunforeseen")

    before_step(fail)
    with pytest.raises(RunError) as error:
        run(tiny_settings, out)
    assert str(error.value).splitlines() == [
        "The run failed: LookupError: unforeseen.",
        f"There was no checkpoint yet. Details: {out / 'run.log'}",
    ]
    assert "Traceback" in (out / "run.log").read_text()
    assert read_status(out)["timings"].keys() >= {"start_s", "model_s"}, "of a run that ended before any checkpoint"


def test_the_workers_of_an_elastic_run_that_failed(out: Path) -> None:
    """Its run.json has those of the last start, which nobody knows before."""
    out.mkdir()

    def fail() -> None:
        with live_status(out, 0.0, {}) as status:
            status |= {"num_workers": "1:3", "processes": None}
            write_timings(out, {"step_s": 1.5}, 2)
            raise RunError("lost")

    with pytest.raises(RunError, match="lost"):
        fail()
    assert [read_status(out)[name] for name in ("num_workers", "processes", "timings")] == ["1:3", 2, {"step_s": 1.5}]
