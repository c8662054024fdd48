"""Aspect buckets: the sizes, each row's by its image's header, what is merged, and the geometry of both images."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bucket_data import SHAPES, write_pictures
from PIL import Image

from raycontrolnet import TrainConfig
from raycontrolnet.data import image_sizes as module
from raycontrolnet.data.buckets import NOT_USED, Buckets, bucket_sizes, nearest_size
from raycontrolnet.data.image_sizes import find_buckets, header_size, image_sizes
from raycontrolnet.data.order import SampleOrder
from raycontrolnet.data.records import ImageRow, Size
from raycontrolnet.data.size_conditioning import SizeConditioning, crop_corner, resized_size
from raycontrolnet.data.source import Source
from raycontrolnet.data.sources import open_source
from raycontrolnet.data.transforms import decode_rgb, prepare_images, resize_and_crop
from raycontrolnet.errors import DataError
from raycontrolnet.model.base_family import bucket_warning
from raycontrolnet.model.families.registry import families

RESOLUTION = 32


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "pictures", 17)


def config_of(folder: Path, **settings: Any) -> TrainConfig:
    given: dict[str, Any] = {"aspect_buckets": True, "train_batch_size": 2, "seed": 0, "resolution": RESOLUTION}
    return TrainConfig(pretrained_model_name_or_path="base", train_data_dir=str(folder), **given | settings)


def source_of(folder: Path) -> Source:
    return open_source(config_of(folder))


def of(shapes: list[Size], batch_size: int = 1, held_out: list[int] | None = None) -> Buckets:
    """Return the buckets of images of these shapes."""
    others = np.array(held_out or [], np.int64)
    trained = np.setdiff1d(np.arange(len(shapes)), others)
    return Buckets.of(np.array(shapes, np.int32), trained, others, batch_size, bucket_sizes(RESOLUTION))


# --- the sizes ---


@pytest.mark.parametrize(
    ("resolution", "multiple"), [(16, 8), (32, 8), (32, 16), (64, 8), (256, 8), (520, 8), (1024, 8)]
)
def test_sizes_are_of_about_one_area(resolution: int, multiple: int) -> None:
    sizes = bucket_sizes(resolution, multiple)
    step = max(multiple, min(64, resolution // 4))
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes) >= 3
    assert {(width, height) for height, width in sizes} == set(sizes)
    for height, width in sizes:
        assert 0.74 * resolution**2 < height * width <= resolution**2
        assert (height, width) == (resolution, resolution) or height % step == width % step == 0
        assert resolution / 2 <= min(height, width)
        assert max(height, width) <= 2 * resolution
    assert list(sizes) == sorted(sizes, key=lambda size: size[1] / size[0])


def test_sizes_are_in_steps_of_64_from_256_pixels_on() -> None:
    assert bucket_sizes(512) == (
        (1024, 256), (768, 320), (640, 384), (576, 448), (512, 512), (448, 576), (384, 640), (320, 768), (256, 1024)
    )  # fmt: skip
    assert {(832, 1216), (896, 1152), (1024, 1024), (768, 1344)} <= set(bucket_sizes(1024)), "as SDXL's"


def test_an_image_gets_the_nearest_shape() -> None:
    sizes = bucket_sizes(512)
    for image_size, expected in (
        ((512, 512), (512, 512)),
        ((4000, 4001), (512, 512)),
        ((600, 900), (384, 640)),
        ((900, 600), (640, 384)),
        ((10, 1000), (256, 1024)),
        ((1000, 10), (1024, 256)),
    ):
        assert nearest_size(image_size, sizes) == expected
        ratio = image_size[1] / image_size[0]
        distance = {size: abs(np.log(size[1] / size[0] / ratio)) for size in sizes}
        assert distance[expected] == min(distance.values())
    assert nearest_size((10, 1000), [(512, 512)]) == (512, 512)


# --- which row is in which ---


def test_small_buckets_are_merged_into_the_nearest() -> None:
    """Two pictures of 1 x 4 are fewer than a batch of 3: they go to the nearest shape that is left."""
    shapes: list[Size] = [(32, 32)] * 6 + [(24, 40)] * 5 + [(16, 64)] * 2 + [(64, 16)] * 3
    buckets = of(shapes, batch_size=3)
    assert buckets.sizes == ((64, 16), (32, 32), (24, 40))
    assert [buckets.size_of(row) for row in range(16)] == [(32, 32)] * 6 + [(24, 40)] * 7 + [(64, 16)] * 3
    assert buckets.num_rows == (3, 6, 7)
    assert buckets.notes == ("64 x 16 has 2 rows, fewer than a batch of 3: merged into 40 x 24",)
    assert of(shapes, batch_size=2).notes == ()
    alone = of(shapes, batch_size=100)
    assert len(alone.sizes) == 1, "fewer rows than a batch are one bucket"
    assert alone.num_rows == (16,)


def test_held_out_rows_do_not_count() -> None:
    """A bucket with enough rows for a batch has too few once one is held out, which gets the nearest that is left."""
    shapes: list[Size] = [(32, 32)] * 6 + [(16, 64)] * 3
    assert (16, 64) in of(shapes, batch_size=3).sizes
    buckets = of(shapes, batch_size=3, held_out=[8])
    assert buckets.sizes == ((32, 32),)
    assert buckets.size_of(8) == (32, 32)
    assert buckets.num_rows == (8,)


def test_the_table_says_what_is_kept() -> None:
    buckets = of([(32, 32), (32, 40), (60, 20)])
    assert list(buckets.table()) == [
        "aspect buckets: 3 rows in 2 sizes, 85.0% of the pixels kept",
        "  width x height        rows  pixels kept",
        "         16 x 64           1        75.0%",
        "         32 x 32           2        90.0%",
    ]
    for size, image_size in (((16, 64), (60, 20)), ((32, 32), (32, 40)), ((24, 40), (1000, 700))):
        height, width = resized_size(image_size, size)
        found = Buckets.of(np.array([image_size]), np.array([0]), np.array([], np.int64), 1, [size]).kept[0]
        assert found == pytest.approx(size[0] * size[1] / (height * width), rel=0.05)


def test_rows_of_a_run_that_are_not_used_are_not_read(pictures: Path) -> None:
    config = config_of(pictures, max_train_samples=6, validation_split=2)
    order = SampleOrder(17, 0, 6, num_held_out=2)
    assert order.rows is not None
    unused = next(row for row in range(17) if row % 3 != 2 and row not in {*order.rows, *order.held_out})
    (pictures / "images" / f"{unused}.png").write_bytes(b"no image")
    buckets = find_buckets(config, source_of(pictures))
    assert buckets is not None
    assert sum(buckets.of_row != NOT_USED) == 8
    assert sum(buckets.num_rows) == 6
    assert buckets.of_row[unused] == NOT_USED


def test_without_the_flag_there_are_none(pictures: Path) -> None:
    assert find_buckets(config_of(pictures, aspect_buckets=False), source_of(pictures)) is None


# --- the headers ---


def test_sizes_are_those_of_the_decoded_images(pictures: Path) -> None:
    source = source_of(pictures)
    found = image_sizes(source, range(len(source)))
    assert found.tolist() == [list(SHAPES[row % len(SHAPES)]) for row in range(17)]
    decoded = [decode_rgb(source.read(row).image, background=(0, 0, 0)) for row in range(17)]
    assert found.tolist() == [[image.height, image.width] for image in decoded]
    assert decoded[2].getexif() == {}, "turned"


@pytest.mark.parametrize("orientation", [None, 1, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff", "avif", "bmp", "gif"])
def test_a_header_says_the_size_upright(ending: str, orientation: int | None, tmp_path: Path) -> None:
    path, options = tmp_path / f"image.{ending}", dict[str, Any]()
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
    Image.new("RGB", (40, 24)).save(path, **options)
    image = decode_rgb(str(path), background=(0, 0, 0))
    assert header_size(str(path)) == header_size(path.read_bytes()) == (image.height, image.width)
    carries = ending in ("jpg", "png", "webp", "tiff", "avif") and (orientation or 1) >= 5
    assert (image.height, image.width) == ((40, 24) if carries else (24, 40))


def test_sizes_are_read_once(pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, read = source_of(pictures), []
    header = module.header_size

    def counting(image: Any) -> Size:
        read.append(image)
        return header(image)

    monkeypatch.setattr(module, "header_size", counting)
    first = image_sizes(source, range(17))
    assert len(read) == 17
    assert np.array_equal(image_sizes(source, range(17)), first)
    assert len(read) == 17
    assert not image_sizes(source, [2])[0].any()
    assert len(read) == 18, "other rows"
    Image.new("RGB", (300, 20)).save(pictures / "images" / "0.png")
    assert image_sizes(source_of(pictures), range(17))[0].tolist() == [20, 300]
    assert len(read) == 35, "another file"
    for stored in (tmp_path / "cache").rglob("*.npy"):
        stored.write_bytes(b"damaged")
    assert np.array_equal(image_sizes(source, range(17))[1:], first[1:])


def test_a_cache_that_cannot_be_written_stops_nothing(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert image_sizes(source_of(pictures), range(17)).all()


def test_what_cannot_be_read_is_named_or_skipped(pictures: Path) -> None:
    (pictures / "images" / "3.png").write_bytes(b"no image")
    (pictures / "images" / "4.png").unlink()
    os.mkfifo(pictures / "images" / "4.png")  # opening it would wait
    source = open_source(config_of(pictures), skip_bad=True)
    with pytest.raises(DataError) as error:
        image_sizes(source, range(17))
    lines = str(error.value).splitlines()
    assert f"{pictures}/metadata.jsonl:4, image: {pictures}/images/3.png is not an image in a format" in lines[0]
    assert f"{pictures}/images/4.png: is a named pipe, not an image file" in lines[1]
    assert lines[2:] == ["fix the data, or skip such rows with --on_bad_sample skip"]
    sizes = image_sizes(source, range(17), skip_bad=True)
    assert sizes[3:5].tolist() == [[1, 1], [1, 1]]
    assert find_buckets(config_of(pictures, on_bad_sample="skip"), source) is not None


def test_a_header_that_is_sound_does_not_hide_a_broken_one(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of headers that fails where the decoder does not costs time alone."""

    def fails(_: Any) -> Size:
        raise ValueError("no header")

    monkeypatch.setattr(module, "header_size", fails)
    assert image_sizes(source_of(pictures), range(17)).tolist() == [list(SHAPES[row % 5]) for row in range(17)]


# --- the geometry ---


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (40, 24), (16, 64), (64, 16)])
@pytest.mark.parametrize("image_size", [(32, 32), (77, 31), (31, 77), (500, 333), (16, 64), (9, 8)])
def test_both_images_are_cut_at_one_place(size: Size, image_size: Size, tmp_path: Path) -> None:
    """A mark in the middle of both, and the same content, stay where they were for each other."""
    height, width = image_size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels[height // 2, width // 2] = 255
    for name in ("image.png", "control.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    row = ImageRow(str(tmp_path / "image.png"), str(tmp_path / "control.png"), ("",), "row 1")
    prepared = prepare_images(row, size)
    assert prepared.image.shape == (*size, 3)
    assert np.array_equal(prepared.image, prepared.conditioning_image)
    assert prepared.original_size == image_size
    resized, (top, left) = resized_size(image_size, size), crop_corner(image_size, size)
    assert all(own >= wanted for own, wanted in zip(resized, size, strict=True))
    assert resized[0] == size[0] or resized[1] == size[1]
    assert top == 0 or resized[0] > size[0]
    assert left == 0 or resized[1] > size[1]
    assert abs(resized[1] / resized[0] / (width / height) - 1) < 0.13
    expected = Image.fromarray(pixels).resize((resized[1], resized[0]), Image.Resampling.BILINEAR)
    cut = np.asarray(expected)[top : top + size[0], left : left + size[1]]
    assert np.array_equal(prepared.image, cut)


def test_a_square_is_as_without_buckets() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (53, 37, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(resize_and_crop(image, (32, 32)), resize_and_crop(image, 32))


def test_sdxl_is_told_the_sizes_of_the_bucket() -> None:
    assert SizeConditioning(32, (3, 5)).conditions((100, 90), size=(24, 40)) == (24, 40, 3, 5, 24, 40)
    real = SizeConditioning(32, real=True)
    assert real.conditions((100, 200), size=(24, 40)) == (100, 200, 0, 4, 24, 40)
    assert real.conditions((200, 200), size=(24, 40)) == (200, 200, 8, 0, 24, 40)
    assert real.conditions((100, 200)) == (100, 200, 0, 16, 32, 32)


def test_small_buckets_are_warned_of_for_sdxl() -> None:
    by_name = {family.has_size_conditions: family for family in families()}
    buckets = of([(32, 32), (16, 64)])
    found = bucket_warning(buckets, by_name[True])
    assert found is not None
    assert found.startswith("aspect buckets with a side below 256 pixels (32 x 32, 64 x 16): Stable Diffusion XL was")
    assert bucket_warning(buckets, by_name[False]) is None
    assert bucket_warning(buckets, None) is None
    assert bucket_warning(None, by_name[True]) is None
    large = Buckets.of(np.array([[512, 512]]), np.array([0]), np.array([], np.int64), 1, bucket_sizes(512))
    assert bucket_warning(large, by_name[True]) is None


def test_the_data_set_of_these_tests_has_turned_pictures(pictures: Path) -> None:
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    with Image.open(pictures / rows[2]["image"]) as image:
        assert (image.width, image.height) == SHAPES[2], "turned by a quarter: height and width change places"
