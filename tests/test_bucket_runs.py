"""Whole runs with aspect buckets: one size a batch, from pixels and cache, resumed, held out, drawn and refused."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from bucket_data import SHAPES, write_pictures
from PIL import Image
from processes import start_ray
from reference import training, write_trained_controlnet
from runs import Settings, check_resume_is_exact, column, equal, flags, lines, losses, run, weights

from raycontrolnet import GenerateConfig, TrainConfig, fit, generate
from raycontrolnet.cli import main
from raycontrolnet.data.records import PreparedRow
from raycontrolnet.errors import ConfigError
from raycontrolnet.launch import preflight
from raycontrolnet.launch.checked_run import CheckedRun
from raycontrolnet.storage.stored_folder import run_folder
from raycontrolnet.training.held_out import KeptSamples, measure

MEASURED = ("val_loss", "val_loss_shuffled", "control_gap")
TABLE = [
    "aspect buckets: 27 rows in 4 sizes, 95.9% of the pixels kept",
    "  width x height        rows  pixels kept",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", 33)


@pytest.fixture
def settings(tiny_settings: Settings, pictures: Path) -> Settings:
    """Return those of 16 updates, more than two epochs, with six held-out rows."""
    return tiny_settings | {
        "train_data_dir": str(pictures),
        "aspect_buckets": True,
        "max_train_steps": 16,
        "checkpointing_steps": 8,
        "validation_steps": 8,
        "validation_split": 6,
        "lr_warmup_steps": 0,
    }


def checked(settings: Settings, **changed: Any) -> CheckedRun:
    config = TrainConfig(**settings | changed)
    return preflight.check(config, run_folder(config.output_dir))


def measured(folder: Path) -> list[list[float]]:
    return [[line[name] for name in MEASURED] for line in lines(folder / "validation.jsonl")]


def table(text: str) -> list[str]:
    """Return the lines of the table of buckets in what a command has shown."""
    found = text.splitlines()
    start = next(index for index, line in enumerate(found) if line.startswith("aspect buckets"))
    return found[start : start + 6]


def test_a_run_from_pixels_and_from_the_cache(
    settings: Settings, tmp_path: Path, seen: list[list[PreparedRow]]
) -> None:
    """Batches of one size, each row once an epoch; the cache changes neither losses nor the held-out measure."""
    base = Path(settings["pretrained_model_name_or_path"])
    settings["controlnet_model_name_or_path"] = str(write_trained_controlnet(base, tmp_path / "controlnet"))
    pixels = run(settings, tmp_path / "pixels")
    batches = seen[:]
    assert len(batches) == 16
    sizes = [{row.size for row in batch} for batch in batches]
    assert all(len(size) == 1 for size in sizes)
    assert set.union(*sizes) == {(32, 32), (24, 40), (40, 24), (16, 64)}
    assert [row.sample_index for batch in batches for row in batch] == list(range(64))
    for row in (row for batch in batches for row in batch):
        assert row.image is not None
        assert row.image.shape == row.conditioning_image.shape == (*row.size, 3)
    uses = Counter(row.prompt for batch in batches for row in batch)
    assert set(uses.values()) <= {1, 2, 3}, "2.4 epochs; a bucket may be a batch ahead or behind"
    assert len(uses) == 27

    latents = {"cache_latents": "on", "latents_dtype": "float32", "latents_cache_dir": str(tmp_path / "latents")}
    cached = run(settings, tmp_path / "cached", **latents)
    assert all(row.image is None for batch in seen[16:] for row in batch)
    for own, other in zip(batches, seen[16:], strict=True):
        for one, two in zip(own, other, strict=True):
            assert (one.prompt, one.size) == (two.prompt, two.size)
            assert np.array_equal(one.conditioning_image, two.conditioning_image)
    assert losses(cached) == pytest.approx(losses(pixels), abs=1e-5)
    assert len(measured(pixels)) == 2
    assert all(abs(gap) > 1e-6 for _, _, gap in measured(pixels)), "the control images matter to this one"
    for expected, figures in zip(measured(pixels), measured(cached), strict=True):
        assert figures == pytest.approx(expected, abs=1e-6)


def test_flips_crops_and_weighted_sources(settings: Settings, tmp_path: Path, seen: list[list[PreparedRow]]) -> None:
    """All at once: batches of one size, and the cache learns what the pixels do."""
    more = write_pictures(tmp_path / "more", 9)
    settings |= {"train_data_dir": (settings["train_data_dir"], str(more)), "data_weights": (1, 2)}
    settings |= {"random_flip": True, "crop": "top", "max_train_steps": 8, "validation_split": 4}
    pixels = run(settings, tmp_path / "pixels")
    latents = {"cache_latents": "on", "latents_dtype": "float32", "latents_cache_dir": str(tmp_path / "latents")}
    cached = run(settings, tmp_path / "cached", **latents)
    assert losses(cached) == pytest.approx(losses(pixels), abs=1e-5)
    assert measured(cached)[0] == pytest.approx(measured(pixels)[0], abs=1e-5)
    for one, two in zip(seen[:8], seen[8:], strict=True):
        assert len({row.size for row in one}) == 1
        for own, other in zip(one, two, strict=True):
            assert np.array_equal(own.conditioning_image, other.conditioning_image)
    assert len({batch[0].size for batch in seen}) >= 3


def test_resume_is_exact(settings: Settings, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch, with accumulation over micro-batches of different sizes."""
    changed: Settings = {"train_batch_size": 2, "gradient_accumulation_steps": 3, "max_train_steps": 6}
    changed |= {"checkpointing_steps": 2, "validation_steps": 6}
    check_resume_is_exact(settings, tmp_path, **changed)


def test_square_pictures_learn_the_same_as_without(tiny_settings: Settings, tmp_path: Path) -> None:
    """A single bucket is today's run, bit for bit."""
    changed: Settings = {"validation_split": 3, "validation_steps": 2, "gradient_accumulation_steps": 2}
    without = run(tiny_settings, tmp_path / "without", **changed)
    one = run(tiny_settings, tmp_path / "one", **changed, aspect_buckets=True)
    assert losses(one) == losses(without)
    assert equal(weights(one), weights(without))
    assert measured(one) == measured(without)


# --- on Ray ---


@pytest.mark.slow
@pytest.mark.usefixtures("_local_ray")
@pytest.mark.parametrize("cached", [False, True])
def test_workers_that_come_and_go_keep_the_curve(cached: bool, settings: Settings, tmp_path: Path) -> None:
    """An elastic run of up to 4 workers: two updates on 2, then two on 1; those of a run in one process."""
    settings |= {"train_batch_size": 2, "max_train_steps": 4, "checkpointing_steps": 2, "validation_steps": 2}
    if cached:
        settings |= {"cache_latents": "on", "latents_dtype": "float32", "latents_cache_dir": str(tmp_path / "latents")}
    whole = run(settings, tmp_path / "whole", num_workers="0", gradient_accumulation_steps=4)
    elastic = settings | {"num_workers": "1:4", "dataloader_num_workers": 1}
    ray.shutdown()  # it may keep a CPU for the loading of an earlier test's killed run, for three minutes
    start_ray()
    out = run(elastic, tmp_path / "out", cpus_per_worker=1.5, max_train_steps=2)
    run(elastic, out, cpus_per_worker=2.0, resume_from_checkpoint="latest")
    log = (out / "run.log").read_text()
    assert [log.count(f"update {step} on: {workers}") for step, workers in ((0, "2 workers"), (2, "1 worker"))] == [
        1,
        1,
    ]
    assert column(out, "samples") == column(whole, "samples") == [8, 16, 24, 32]
    assert losses(out) == pytest.approx(losses(whole), rel=0, abs=1e-5)
    for expected, figures in zip(measured(whole), measured(out), strict=True):
        assert figures == pytest.approx(expected, rel=0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("_local_ray")
def test_four_workers_learn_what_one_does(settings: Settings, tmp_path: Path) -> None:
    """A fixed number of workers, for which batches travel in bundles."""
    settings |= {"train_batch_size": 2, "max_train_steps": 8, "checkpointing_steps": 8}
    whole = run(settings, tmp_path / "whole", num_workers="0", gradient_accumulation_steps=4)
    four = run(settings, tmp_path / "four", num_workers="4", cpus_per_worker=0.5)
    assert losses(four) == pytest.approx(losses(whole), rel=0, abs=1e-5)


# --- the held-out measure ---


def test_held_out_rows_are_measured_in_their_buckets(settings: Settings) -> None:
    """The same figures for every batch size, and with what was kept; batches are of one size."""
    loader = checked(settings).loader
    held_out = [loader.held_out_sample(index) for index in range(6)]
    by_size = Counter(row.size for row in held_out)
    assert sorted(by_size.values()) == [1, 1, 2, 2], "ragged batches, and a bucket with a single row"
    found = []
    with training(settings) as state:
        with torch.no_grad():
            for weight in state.components.controlnet.parameters():
                weight.add_(0.2)
        for batch_size in (1, 2, 4):
            kept = KeptSamples()
            sized = checked(settings, train_batch_size=batch_size).loader
            assert sized.buckets
            assert loader.buckets
            assert sized.buckets.sizes == loader.buckets.sizes
            found += [measure(state, sized, kept=kept), measure(state, sized, kept=kept)]
            assert kept.num_samples == 6
            assert len(kept.batches) == sum(-(-number // batch_size) for number in by_size.values())
    for each in found:
        assert each is not None
        assert found[0] is not None
        assert each[1:5] == pytest.approx(found[0][1:5], rel=1e-5, abs=1e-7)


# --- validation images ---


def test_a_control_image_is_drawn_in_its_bucket(settings: Settings, pictures: Path, tmp_path: Path) -> None:
    """Control images of 50 x 30, 40 x 40 and 70 x 90 pixels, each in the nearest size that is trained on."""
    controls = [str(pictures / "conditioning" / f"{index}.png") for index in (1, 0, 3)]
    folder = run(
        settings, tmp_path / "out", max_train_steps=2, checkpointing_steps=2, validation_steps=2,
        validation_prompt=("a", "b", "c"), validation_image=tuple(controls), num_validation_images=2,
        control_fidelity="canny",
    )  # fmt: skip
    for pair, size in enumerate([(24, 40), (32, 32), (32, 32)]):
        for name in ("control", "image-00", "image-01"):
            with Image.open(folder / "validation" / "step-000002" / f"pair-{pair:02d}-{name}.png") as image:
                assert image.size == size, (pair, name)
    assert len(lines(folder / "validation" / "step-000002" / "metadata.jsonl")) == 6

    # `generate` brings control images to the sizes of the run, those that it had no rows for as well.
    Image.new("RGB", (16, 80)).save(tmp_path / "high.png")
    drawn = generate(
        GenerateConfig(
            controlnet=str(folder), prompt=("a", "b", "c"), image=(*controls[:2], str(tmp_path / "high.png")),
            out=str(tmp_path / "drawn"), num_images=1, num_inference_steps=1, batch_size=3, use_gpu=False,
        ),
        stream=(said := io.StringIO()),
    )  # fmt: skip
    assert "3 pairs x 1 image of about 32 x 32 px in the control image's shape, 1 step," in said.getvalue()
    sizes = []
    for result in drawn:
        with Image.open(result.images[0]) as image, Image.open(result.control) as control:
            assert image.size == control.size
            sizes.append(image.size)
    assert sizes == [(24, 40), (32, 32), (16, 64)]


# --- SDXL ---


def test_sdxl_is_told_each_buckets_size(
    settings: Settings, tiny_xl_base: Path, tmp_path: Path, seen: list[list[PreparedRow]]
) -> None:
    """From pixels and from the cache; with `real` each image's own size and its crop as well."""
    settings |= {"pretrained_model_name_or_path": str(tiny_xl_base), "size_conditioning": "real", "max_train_steps": 6}
    pixels = run(settings, tmp_path / "pixels")
    latents = {"cache_latents": "on", "latents_dtype": "float32", "latents_cache_dir": str(tmp_path / "latents")}
    cached = run(settings, tmp_path / "cached", **latents)
    assert losses(cached) == pytest.approx(losses(pixels), abs=1e-5)
    shapes = set()
    for batch in seen:
        for row in batch:
            assert row.size_conditions is not None
            assert row.size_conditions[4:] == row.size
            assert row.size_conditions[:2] == SHAPES[int(row.prompt.split()[1]) % len(SHAPES)]
            shapes.add(row.size)
    assert len(shapes) >= 3
    assert "were not trained" not in (pixels / "run.log").read_text()


# --- what is said ---


def test_the_table_is_shown_by_train_prepare_and_check(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = io.StringIO()
    fit(TrainConfig(**settings | {"max_train_steps": 1}), stream=shown)
    assert table(shown.getvalue())[:2] == TABLE
    given = {name: value for name, value in settings.items() if name not in ("use_gpu", "aspect_buckets")}
    same = [*flags(given | {"output_dir": str(tmp_path / "other")}), "--aspect_buckets", "--use_gpu", "False"]
    for command in ("prepare", "check"):
        more = ["--latents_cache_dir", str(tmp_path / "latents")] if command == "prepare" else []
        assert main([command, *same, *more]) == 0
        output = capsys.readouterr()
        assert table(output.out + output.err) == table(shown.getvalue())
    # As `train` says what to run, `prepare` has done it.
    fit(
        TrainConfig(**settings | {"output_dir": str(tmp_path / "c"), "cache_latents": "on", "max_train_steps": 1}
        | {"latents_cache_dir": str(tmp_path / "latents")}), stream=shown,
    )  # fmt: skip
    assert "latents: 0/33" not in shown.getvalue(), "prepare has encoded them"


def test_merged_buckets_are_said(settings: Settings, tmp_path: Path) -> None:
    shown = io.StringIO()
    changed = {"train_batch_size": 6, "max_train_steps": 1, "output_dir": str(tmp_path / "out")}
    fit(TrainConfig(**settings | changed), stream=shown)
    assert "  64 x 16 has 5 rows, fewer than a batch of 6: merged into 40 x 24\n" in shown.getvalue()


# --- what is refused, and what changes ---


def test_a_batch_size_that_splits_batches_is_refused(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    folder = run(settings, Path(settings["output_dir"]), max_train_steps=2, checkpointing_steps=2)
    manifest = json.loads((folder / "checkpoint-2" / "manifest.json").read_text())
    assert manifest["buckets"] == [[40, 24], [32, 32], [24, 40], [16, 64]]
    resumed = settings | {"resume_from_checkpoint": "latest", "max_train_steps": 4}
    with pytest.raises(ConfigError) as error:
        checked(resumed, train_batch_size=3)
    (problem,) = error.value.problems
    assert problem == (
        "--train_batch_size=3: does not divide the 8 samples of checkpoint-2, and a batch must be of one aspect "
        "bucket; use 4, or a divisor of it"
    )
    checked(resumed)
    assert "the order of samples changes" not in caplog.text
    checked(resumed, train_batch_size=2)
    assert "was made with --train_batch_size=4: the order of samples changes" in caplog.text
    checked(resumed, aspect_buckets=False, train_batch_size=3)
    assert "was made with other aspect buckets: the order of samples changes" in caplog.text


def test_another_cache_is_refused(settings: Settings, tmp_path: Path) -> None:
    """Latents of squares do not serve buckets, nor the other way round."""
    settings |= {"cache_latents": "on", "latents_cache_dir": str(tmp_path / "latents"), "max_train_steps": 1}
    run(settings, tmp_path / "one")
    with pytest.raises(ConfigError, match="does not fit this run \\(other aspect buckets\\)") as error:
        run(settings, tmp_path / "other", aspect_buckets=False)
    assert "--aspect_buckets" not in str(error.value)
    shutil.rmtree(tmp_path / "latents")
    run(settings, tmp_path / "square", aspect_buckets=False)
    with pytest.raises(ConfigError, match="other aspect buckets") as error:
        run(settings, tmp_path / "again")
    assert "--aspect_buckets --latents_cache_dir" in str(error.value) or "--aspect_buckets " in str(error.value)
    assert f"--train_batch_size {settings['train_batch_size']}" in str(error.value)


def test_bad_samples_are_left_out_of_the_order(settings: Settings, pictures: Path, tmp_path: Path) -> None:
    """A picture that is cut off has a good header: its bucket is known, and the cache leaves it out."""
    data = Path(shutil.copytree(pictures, tmp_path / "data"))
    content = (data / "images" / "9.png").read_bytes()
    (data / "images" / "9.png").write_bytes(content[: len(content) // 2])
    (data / "images" / "10.png").write_bytes(b"no image")
    changed = {"train_data_dir": str(data), "on_bad_sample": "skip", "max_bad_fraction": 0.1, "cache_latents": "on"}
    changed |= {"latents_cache_dir": str(tmp_path / "latents"), "max_train_steps": 8}
    folder = run(settings, tmp_path / "out", **changed)
    assert len(column(folder, "loss")) == 8
    assert json.loads((folder / "checkpoint-8" / "manifest.json").read_text())["left_out"] == [9, 10]
