"""Paired augmentation: mirroring and crops are the same for both images, from pixels and from the cache."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from runs import Settings, equal, flags, losses, run, train, weights

from raycontrolnet import TrainConfig, prepare
from raycontrolnet.cli import main, parse
from raycontrolnet.data.augmentation import CENTRED, Augmentation, View
from raycontrolnet.data.decoding import prepared
from raycontrolnet.data.order import SampleOrder
from raycontrolnet.data.records import PreparedRow
from raycontrolnet.data.sample_rows import PixelRows, SampleRows
from raycontrolnet.data.sides import side_warning
from raycontrolnet.data.size_conditioning import SizeConditioning, corner_in_view, crop_corner
from raycontrolnet.data.source import Source
from raycontrolnet.data.sources import open_source
from raycontrolnet.data.stream import BatchLoader
from raycontrolnet.data.transforms import encode_conditioning, prepare_images, resize_and_crop
from raycontrolnet.errors import ConfigError
from raycontrolnet.latents.cache import LatentCache
from raycontrolnet.latents.encoder import LatentEncoder
from raycontrolnet.latents.manifest import Encoding, Manifest
from raycontrolnet.latents.plan import LatentPlan, prepare_command
from raycontrolnet.model.families.stable_diffusion import STABLE_DIFFUSION

RESOLUTION = 32
SIZES = ((56, 32), (32, 72), (49, 32))
"""(width, height) of the rows in turn: nothing is resized, and there is room beside the crop."""
NUM_ROWS = 9
BOTH = Augmentation("random", random_flip=True)


def marked(width: int, height: int, row: int) -> Image.Image:
    """Return an image whose every pixel says where it is: red its x, green its y, blue the row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, np.full_like(x, row)], axis=-1).astype(np.uint8))


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write rows whose images are marked, with captions of which a third speak of left."""
    folder = tmp_path_factory.mktemp("marks")
    lines = []
    for row in range(NUM_ROWS):
        for name in ("image", "control"):
            marked(*SIZES[row % 3], row).save(folder / f"{name}-{row}.png")
        caption = f"the cat on the LEFT, {row}" if row % 3 == 0 else f"a leftover bright cat, {row}"
        names = {"image": f"image-{row}.png", "conditioning_image": f"control-{row}.png"}
        lines.append(json.dumps(names | {"text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def source(marks: Path) -> Source:
    return open_source(TrainConfig(pretrained_model_name_or_path="base", train_data_dir=str(marks)))


def loader_of(
    source: Source, augmentation: Augmentation, *, rows: SampleRows | None = None, seed: int = 0, batch_size: int = 4,
    num_held_out: int = 0,
) -> BatchLoader:  # fmt: skip
    order = SampleOrder(len(source), seed, num_held_out=num_held_out)
    sizes = SizeConditioning(RESOLUTION, real=True)
    pixels = PixelRows(source, RESOLUTION)
    return BatchLoader(rows or pixels, order, batch_size, 0.0, sizes=sizes, augmentation=augmentation)


def seen(image: NDArray[np.uint8]) -> tuple[int, int, bool]:
    """Return top, left and mirrored of a marked crop, and check that it is nothing else."""
    (left, top, row), flipped = image[0, 0].tolist(), bool(image[0, 0, 0] > image[0, 1, 0])
    left -= (RESOLUTION - 1) if flipped else 0
    whole = np.asarray(marked(*SIZES[row % 3], row))[top : top + RESOLUTION, left : left + RESOLUTION]
    assert np.array_equal(image, whole[:, ::-1] if flipped else whole)
    return top, left, flipped


def said(row: PreparedRow, image: NDArray[np.uint8]) -> tuple[int, int]:
    """Return the corner that the size conditions name, as it is in the file, for the crop that `image` shows."""
    assert row.size_conditions is not None
    height, width, top, left, *_ = row.size_conditions
    assert (width, height) == SIZES[int(image[0, 0, 2]) % 3]
    return top, width - RESOLUTION - left if seen(image)[2] else left


# --- from pixels ---


@pytest.mark.parametrize("crop", ["center", "top", "random"])
@pytest.mark.parametrize("random_flip", [False, True])
def test_both_images_are_seen_alike(source: Source, crop: str, *, random_flip: bool) -> None:
    loader = loader_of(source, Augmentation(crop, random_flip))
    views = []
    for row in map(loader.sample, range(8 * NUM_ROWS)):
        assert row.image is not None
        assert np.array_equal(row.image, row.conditioning_image)
        top, left, flipped = seen(row.image)
        views.append((int(row.image[0, 0, 2]), top, left, flipped))
        assert said(row, row.image) == (top, left)
    share = np.mean([flipped for *_, flipped in views])
    assert 0.3 < share < 0.7 if random_flip else share == 0
    corners = [{(top, left) for row, top, left, _ in views if row == one} for one in range(NUM_ROWS)]
    if crop == "random":
        assert min(map(len, corners)) > 3
        assert len({top for one in range(1, NUM_ROWS, 3) for top, _ in corners[one]}) > 8
    else:
        assert corners[:3] == [{(0, 12)}, {(0 if crop == "top" else 20, 0)}, {(0, 8)}]


def test_images_of_two_sizes_are_cropped_at_the_same_place() -> None:
    """The control image may be smaller, as depth maps are: the shares of the room are the same."""
    large, small = marked(240, 120, 0), marked(120, 60, 0)
    for view in (View(0.0, 0.25), View(1.0, 0.75, flipped=True), CENTRED):
        one, other = (resize_and_crop(image, 60, "bilinear", view).astype(int) for image in (large, small))
        assert np.abs(one[..., 0] / 2 - other[..., 0]).max() <= 1


def test_a_view_is_a_function_of_seed_and_sample(source: Source) -> None:
    views = [BOTH.view(3, index) for index in range(2000)]
    assert [BOTH.view(3, index) for index in reversed(range(2000))] == views[::-1]
    assert [BOTH.view(4, index) for index in range(2000)] != views
    assert len({view[:2] for view in views}) == 2000
    for numbers in zip(*views, strict=True):
        assert 0.47 < np.mean(numbers) < 0.53
    assert np.corrcoef(np.array(views, float).T)[np.triu_indices(3, 1)] == pytest.approx(0, abs=0.08)
    assert [Augmentation("top", random_flip=True).view(3, k).flipped for k in range(2000)] == [v.flipped for v in views]
    assert [Augmentation("random").view(3, k)[:2] for k in range(2000)] == [view[:2] for view in views]
    wide, narrow = loader_of(source, BOTH, batch_size=12), pickle.loads(pickle.dumps(loader_of(source, BOTH)))
    samples = [sample for first in (0, 4, 8) for sample in narrow.batch(first)]
    assert pickle.dumps([prepared(row) for row in wide.batch(0)]) == pickle.dumps([prepared(row) for row in samples])


def test_without_augmentation_nothing_changes(source: Source) -> None:
    config = TrainConfig(pretrained_model_name_or_path="base", train_data_dir="data")
    assert (config.crop, config.random_flip) == ("center", False)
    loader = dataclasses.replace(loader_of(source, Augmentation()), sizes=None)
    plain = BatchLoader(PixelRows(source, RESOLUTION), loader.order, 4, 0.0)
    assert pickle.dumps(loader.batch(0)) == pickle.dumps(plain.batch(0))
    for row in plain.batch(0):
        assert isinstance(row, PreparedRow)
        image = Image.open(str(source.read(plain.order.row(row.sample_index)).image))
        assert np.array_equal(row.image, resize_and_crop(image, RESOLUTION))  # type: ignore[arg-type]


def test_held_out_rows_are_plain(source: Source) -> None:
    for augmentation in (BOTH, Augmentation("top", random_flip=True)):
        loader, plain = (loader_of(source, each, num_held_out=6) for each in (augmentation, Augmentation()))
        for index in range(6):
            row, centred = loader.held_out_sample(index), plain.held_out_sample(index)
            assert row.image is not None
            top, _, flipped = seen(row.image)
            assert not flipped
            assert pickle.dumps(row) == pickle.dumps(centred) or (augmentation.crop == "top" and top == 0)


@pytest.mark.parametrize("size", [(640, 427), (33, 32), (32, 32), (600, 801)])
def test_corners_stay_inside_and_mirror_twice_is_nothing(size: tuple[int, int]) -> None:
    square = (32, 32)
    assert crop_corner(size, square) == crop_corner(size, square, CENTRED)
    for top, left in ((0.0, 0.0), (1.0, 1.0), (0.999, 0.001), (0.5, 0.5)):
        view = View(top, left)
        there, mirrored = crop_corner(size, square, view), corner_in_view(size, square, view._replace(flipped=True))
        assert corner_in_view(size, square, view) == there
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        one = resize_and_crop(Image.fromarray(pixels), 32, "bilinear", view._replace(flipped=True))
        assert one.shape == (32, 32, 3)
        assert one.flags.c_contiguous
        assert min(*there, *mirrored) >= 0
        assert there[0] == mirrored[0]


# --- from the latent cache ---


@pytest.fixture
def settings(run_settings: Settings, marks: Path, tmp_path: Path) -> Settings:
    return run_settings | {
        "train_data_dir": str(marks),
        "latents_cache_dir": str(tmp_path / "cache"),
        "latents_dtype": "float32",
        "cache_latents": "on",
        "output_dir": str(tmp_path / "out"),
    }


def prepared_cache(settings: Settings) -> LatentCache:
    """Make the cache of a run, and return it."""
    config = TrainConfig(**settings)
    prepare(config, stream=io.StringIO())
    plan = LatentPlan.of(config, open_source(config), STABLE_DIFFUSION, None)
    assert plan.manifest is not None
    plan.check_encoding()
    return LatentCache.of(plan.folder, plan.manifest, plan.shards)


def encoder_of(settings: Settings) -> LatentEncoder:
    return LatentEncoder(TrainConfig(**settings), device=torch.device("cpu"), batch_size=4)


def test_latents_are_those_of_the_mirrored_picture(settings: Settings, source: Source) -> None:
    cache, encoder = prepared_cache(settings | {"random_flip": True}), encoder_of(settings)
    for row in range(NUM_ROWS):
        there = cache.read(row)
        images = prepare_images(source.read(row), RESOLUTION, view=View(flipped=True))
        assert there.flipped_posterior is not None
        np.testing.assert_allclose(there.flipped_posterior, encoder.encode([images.image])[0], rtol=1e-3, atol=1e-3)
        assert not np.allclose(there.flipped_posterior, there.posterior[..., ::-1], rtol=1e-2), "mirrored latents?"
        assert there.crop is None
    stored = Manifest.read(cache.folder)
    assert stored is not None
    assert stored.encoding.random_flip
    assert json.loads(cache.folder.read("manifest.json"))["encoding"]["random_flip"] is True


def test_samples_of_the_cache_are_mirrored_as_those_from_pixels(settings: Settings, source: Source) -> None:
    cache, flips = prepared_cache(settings | {"random_flip": True}), Augmentation(random_flip=True)
    pixels, cached = loader_of(source, flips), loader_of(source, flips, rows=cache)
    plain = loader_of(source, Augmentation(), rows=cache, num_held_out=4)
    seen_flipped = 0
    for index in range(3 * NUM_ROWS):
        one, other = pixels.sample(index), cached.sample(index)
        assert np.array_equal(one.conditioning_image, other.conditioning_image)
        assert (one.prompt, one.size_conditions) == (other.prompt, other.size_conditions)
        row = cache.read(cached.order.row(index))
        flipped = seen(one.conditioning_image)[2]
        assert np.array_equal(other.posterior, row.flipped_posterior if flipped else row.posterior)  # type: ignore[arg-type]
        seen_flipped += flipped
    assert 0 < seen_flipped < 3 * NUM_ROWS
    for index in range(4):
        assert not seen(plain.held_out_sample(index).conditioning_image)[2]


def test_learning_is_the_same_from_pixels_and_from_the_cache(settings: Settings, tmp_path: Path) -> None:
    flips = settings | {"random_flip": True, "max_train_steps": 12, "checkpointing_steps": 100}
    pixels = losses(run(flips, tmp_path / "pixels", cache_latents="off"))
    assert losses(run(flips, tmp_path / "cached")) == pytest.approx(pixels, rel=1e-4)
    plain = losses(run(flips, tmp_path / "plain", cache_latents="off", random_flip=False))
    assert sum(abs(one - other) > 1e-3 * one for one, other in zip(plain, pixels, strict=True)) > 6


def test_a_random_crop_is_fixed_for_each_row(settings: Settings, source: Source, tmp_path: Path) -> None:
    """It is the same in all epochs and in caches of other seeds; what is stored is what it shows."""
    random = settings | {"crop": "random", "random_flip": True}
    cache, encoder = prepared_cache(random), encoder_of(settings)
    again = prepared_cache(random | {"seed": 5, "latents_cache_dir": str(tmp_path / "again")})
    assert again.shard_names == cache.shard_names
    crops, loader = set(), loader_of(source, BOTH, rows=cache)
    corners: dict[int, tuple[int, int]] = {}
    for index in range(4 * NUM_ROWS):
        sample = loader.sample(index)
        row, (top, left, _) = loader.order.row(index), seen(sample.conditioning_image)
        assert corners.setdefault(row, (top, left)) == (top, left) == said(sample, sample.conditioning_image)
        crop = cache.read(row).crop
        assert crop is not None
        crops.add(crop)
        view = View(*crop)
        images = prepare_images(source.read(row), RESOLUTION, view=view)
        assert encode_conditioning(images.conditioning_image) == cache.read(row).conditioning_png
        np.testing.assert_allclose(cache.read(row).posterior, encoder.encode([images.image])[0], rtol=1e-3, atol=1e-3)
    assert len(crops) == NUM_ROWS


def test_held_out_rows_are_stored_plain(settings: Settings, source: Source) -> None:
    random = settings | {"crop": "random", "validation_split": 4}
    loader = loader_of(source, Augmentation("random"), rows=prepared_cache(random), num_held_out=4)
    plain = loader_of(source, Augmentation(), num_held_out=4)
    for index in range(4):
        held_out = loader.held_out_sample(index)
        expected = plain.held_out_sample(index)
        assert np.array_equal(held_out.conditioning_image, expected.conditioning_image)
        assert held_out.size_conditions == expected.size_conditions
    trained = {row: loader.rows.read(row, CENTRED).crop for row in range(NUM_ROWS)}  # type: ignore[union-attr]
    assert {row for row, crop in trained.items() if crop == (0.5, 0.5)} == set(loader.order.held_out.tolist())
    plan = LatentPlan.of(TrainConfig(**random | {"seed": 9}), source, STABLE_DIFFUSION, None)
    with pytest.raises(ConfigError, match="4 rows drawn by --seed 0 held out, not 4 rows drawn by --seed 9") as error:
        plan.check_encoding()
    assert "--crop random" in str(error.value)
    assert "--seed 9 --validation_split 4" in str(error.value)


def test_a_cache_with_mirror_images_serves_runs_without(settings: Settings, source: Source) -> None:
    prepare(TrainConfig(**settings), stream=io.StringIO())
    plan = LatentPlan.of(TrainConfig(**settings | {"random_flip": True}), source, STABLE_DIFFUSION, None)
    with pytest.raises(ConfigError, match=r"random_flip: False, not True\)") as error:
        plan.check_encoding()
    command = str(error.value).splitlines()[-1]
    assert "--random_flip" in command
    config = parse("prepare", command.split()[2:])
    assert config.random_flip
    prepare(config, stream=io.StringIO())
    plan = LatentPlan.of(dataclasses.replace(config, random_flip=False), source, STABLE_DIFFUSION, None)
    plan.check_encoding()
    assert not plan.survey()[1], "nothing is encoded anew"
    with pytest.raises(ConfigError, match="crop: center, not top"):
        LatentPlan.of(dataclasses.replace(config, crop="top"), source, STABLE_DIFFUSION, None).check_encoding()


def test_names_of_earlier_caches_stay() -> None:
    plain = Encoding(vae="0", resolution=32, dtype="float16")
    assert "crop" not in repr(plain)
    assert "random_flip=True, crop='random'" in repr(dataclasses.replace(plain, random_flip=True, crop="random"))


# --- what is said ---


def test_size_and_crops_are_told(settings: Settings) -> None:
    text = io.StringIO()
    prepare(TrainConfig(**settings | {"random_flip": True, "crop": "random"}), stream=text)
    assert "(each 1.02 kB of latents, also of the mirror image, " in text.getvalue()
    assert text.getvalue().count("latents: each row is cropped once, at random, the same in every run") == 1


def test_a_run_says_what_it_does_and_warns_of_sides(settings: Settings) -> None:
    settings |= {"max_train_steps": 1}
    shown = train(settings | {"cache_latents": "off", "random_flip": True, "crop": "random"}).shown
    assert "augmentation: half of the samples are mirrored; every use of a row has its own random crop; not of" in shown
    warning = "warning: --random_flip: 3 of 9 captions looked at speak of left or right"
    assert shown.count(warning) == 1
    shown = train(settings | {"random_flip": True, "crop": "random", "output_dir": settings["output_dir"] + "2"}).shown
    assert "half of the samples are mirrored, from latents stored both ways; each row has one random crop, for" in shown
    plain = train(settings | {"crop": "top", "latents_cache_dir": None, "output_dir": settings["output_dir"] + "3"})
    assert "augmentation" not in plain.shown
    assert "captions looked at" not in plain.shown


def test_captions_without_sides_are_not_warned_of(circles: Path) -> None:
    assert (
        side_warning(open_source(TrainConfig(pretrained_model_name_or_path="b", train_data_dir=str(circles)))) is None
    )


def test_random_crops_without_a_seed_are_not_cached(settings: Settings, tmp_path: Path) -> None:
    random = settings | {"crop": "random", "seed": None, "validation_split": 2, "max_train_steps": 4}
    with pytest.raises(ConfigError, match="--crop=random: needs --seed to cache latents: it decides the held-out rows"):
        train(random)
    assert main(["check", *flags({name: value for name, value in random.items() if value is not None})]) == 2
    with pytest.raises(ConfigError, match="--crop=random: needs --seed"):
        prepare(TrainConfig(**random), stream=io.StringIO())
    shown = train(random | {"cache_latents": "auto"}).shown
    assert "latents: not cached, because --crop random needs --seed to cache latents" in shown
    assert not (tmp_path / "cache" / "manifest.json").exists()
    assert "cached latents" in train(random | {"validation_split": 0, "output_dir": str(tmp_path / "all")}).shown
    assert "--seed" not in prepare_command(TrainConfig(**random))


@pytest.mark.parametrize(
    ("given", "crop", "flip"),
    [
        (["--random_crop"], "random", False), (["--center_crop", "--random_flip"], "center", True),
        (["--random-crop", "--random-flip"], "random", True), (["--crop", "top"], "top", False),
        (["--center"], "center", False), (["--random_c", "--random_f"], "random", True),
        (["--random_crop", "--crop=random", "--random-crop", "--crop", "random"], "random", False),
        (["--crop", "center", "--crop", "top"], "top", False),
    ],
)  # fmt: skip
def test_flags_of_other_scripts(given: list[str], crop: str, *, flip: bool) -> None:
    config = parse("train", ["--pretrained_model_name_or_path", "base", "--train_data_dir", "data", *given])
    assert (config.crop, config.random_flip) == (crop, flip)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--random_crop", "--crop", "top"], "--random_crop, --crop top"),
        (["--crop=center", "--random-crop"], "--random-crop, --crop center"),
        (["--random_crop", "--seed", "1", "--center_crop"], "--random_crop, --center_crop"),
    ],
)
def test_crops_that_contradict_each_other(given: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--pretrained_model_name_or_path", "base", "--train_data_dir", "data"]
    assert main(["train", *command, *given]) == 2
    assert capsys.readouterr().err == f"error: {named}: contradict each other; keep one of them\n"


@pytest.mark.parametrize(("name", "value"), [("random_crop", "random"), ("center_crop", "center")])
def test_spellings_of_other_scripts_in_a_file(name: str, value: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"{name}: true\n")
    with pytest.raises(ConfigError) as refused:
        parse("train", ["--config", str(tmp_path / "c.yaml")])
    assert str(refused.value).endswith(f": unknown setting {name}; write crop: {value}")


@pytest.mark.parametrize("command", ["train", "tune", "prepare", "check"])
def test_help_names_the_spellings(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert "--random_crop" in shown
    assert "--center_crop" in shown


def test_bad_crops(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--pretrained_model_name_or_path", "base", "--train_data_dir", "data"]
    assert main([*command, "--crop", "centre"]) == 2
    assert "--crop=centre: must be one of center, top, random; perhaps you meant center" in capsys.readouterr().err


# --- whole runs ---


@pytest.mark.parametrize("cache_latents", ["off", "on"])
def test_resume_is_exact(settings: Settings, tmp_path: Path, cache_latents: str) -> None:
    changed: dict[str, Any] = {
        "cache_latents": cache_latents, "random_flip": True, "crop": "random", "train_batch_size": 2,
        "max_train_steps": 8, "checkpointing_steps": 2, "validation_split": 2, "validation_steps": 4,
    }  # fmt: skip
    whole = run(settings, tmp_path / "whole", **changed)
    parts = run(settings, tmp_path / "parts", **changed | {"max_train_steps": 2})
    run(settings, parts, **changed, resume_from_checkpoint="latest")
    assert losses(parts) == losses(whole)
    assert equal(weights(parts), weights(whole))


@pytest.mark.slow
@pytest.mark.usefixtures("_local_ray")
def test_losses_do_not_depend_on_the_number_of_workers(settings: Settings, tmp_path: Path) -> None:
    changed = {"random_flip": True, "crop": "random", "cache_latents": "off", "cpus_per_worker": 0.5}
    here = losses(run(settings, tmp_path / "here", **changed))
    one = losses(run(settings, tmp_path / "one", **changed, num_workers="1"))
    two = losses(run(settings, tmp_path / "two", **changed, num_workers="2", train_batch_size=2))
    assert one == pytest.approx(here, rel=1e-5)
    assert two == pytest.approx(here, rel=1e-5)
