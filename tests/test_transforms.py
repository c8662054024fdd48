"""Decoding, geometry and captions: every Pillow mode, the rounding of torchvision, and what broken files say."""

from __future__ import annotations

import io
import os
import pickle
import struct
import subprocess
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from raycontrolnet.data.decoding import prepared
from raycontrolnet.data.order import SampleOrder
from raycontrolnet.data.records import ImageRow, PreparedRow
from raycontrolnet.data.sample_rows import PixelRows
from raycontrolnet.data.source import Source
from raycontrolnet.data.stream import BatchLoader
from raycontrolnet.data.transforms import (
    CONDITIONING_BACKGROUND,
    IMAGE_BACKGROUND,
    IMAGE_FORMATS,
    MAX_IMAGE_BYTES,
    choose_prompt,
    decode_rgb,
    resize_and_crop,
    to_8_bit,
    to_rgb,
)
from raycontrolnet.errors import DataError

BACKGROUND = (10, 20, 30)
ORANGE = (200, 100, 50)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(data: bytes, background: tuple[int, int, int] = BACKGROUND) -> NDArray[np.uint8]:
    image = decode_rgb(data, background=background)
    assert image.mode == "RGB"
    return np.asarray(image)


def palette_image(*colours: tuple[int, int, int]) -> Image.Image:
    image = Image.new("P", (len(colours), 1))
    image.putpalette([part for colour in colours for part in colour])
    image.putdata(list(range(len(colours))))
    return image


def png(width: int, depth: int, colour_type: int, row: bytes, transparent: bytes = b"") -> bytes:
    """Return a PNG of one row in a form that Pillow does not write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", transparent) if transparent else b"")
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


# mode, file format, pixel, expected colour, tolerance of lossy formats and colour spaces
OPAQUE = [
    ("RGB", "PNG", ORANGE, ORANGE, 0),
    ("RGB", "JPEG", ORANGE, ORANGE, 3),
    ("RGB", "WEBP", ORANGE, ORANGE, 6),
    ("RGB", "BMP", ORANGE, ORANGE, 0),
    ("RGBX", "TIFF", (*ORANGE, 0), ORANGE, 0),
    ("L", "PNG", 77, (77, 77, 77), 0),
    ("L", "JPEG", 77, (77, 77, 77), 1),
    ("1", "PNG", 1, (255, 255, 255), 0),
    ("1", "TIFF", 0, (0, 0, 0), 0),
    ("CMYK", "TIFF", (55, 155, 205, 0), ORANGE, 0),
    ("CMYK", "JPEG", (55, 155, 205, 0), ORANGE, 3),
    ("YCbCr", "TIFF", (124, 86, 182), ORANGE, 2),
    ("I", "TIFF", 257 * 77, (77, 77, 77), 0),
    ("I;16", "PNG", 257 * 77, (77, 77, 77), 0),
    ("I;16", "TIFF", 257 * 77, (77, 77, 77), 0),
    ("I;16B", "TIFF", 257 * 77, (77, 77, 77), 0),
    ("F", "TIFF", 77 / 255, (77, 77, 77), 0),
    ("F", "TIFF", 77.0, (77, 77, 77), 0),
]


@pytest.mark.parametrize(("mode", "kind", "pixel", "colour", "tolerance"), OPAQUE)
def test_every_opaque_mode_gives_its_colour(
    mode: str, kind: str, pixel: object, colour: tuple[int, int, int], tolerance: int
) -> None:
    pixels = decoded(encoded(Image.new(mode, (8, 6), pixel), kind))  # type: ignore[arg-type]
    assert pixels.shape == (6, 8, 3)
    assert np.abs(pixels.astype(int) - colour).max() <= tolerance


TRANSPARENT = [
    ("RGBA", "PNG", (*ORANGE, 0), (*ORANGE, 255), ORANGE),
    ("RGBA", "WEBP", (*ORANGE, 0), (*ORANGE, 255), ORANGE),
    ("RGBA", "TIFF", (*ORANGE, 0), (*ORANGE, 255), ORANGE),
    ("LA", "PNG", (77, 0), (77, 255), (77, 77, 77)),
    ("LA", "TIFF", (77, 0), (77, 255), (77, 77, 77)),
]


@pytest.mark.parametrize(("mode", "kind", "clear", "solid", "colour"), TRANSPARENT)
def test_transparent_pixels_show_the_background(
    mode: str, kind: str, clear: object, solid: object, colour: tuple[int, int, int]
) -> None:
    image = Image.new(mode, (2, 1), clear)  # type: ignore[arg-type]
    image.putpixel((1, 0), solid)  # type: ignore[arg-type]
    pixels = decoded(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert pixels[0].tolist() == [list(BACKGROUND), list(colour)]


def test_half_transparent_pixels_are_mixed() -> None:
    pixels = decoded(encoded(Image.new("RGBA", (1, 1), (255, 255, 255, 51))), background=(0, 0, 0))
    assert pixels[0, 0].tolist() == [51, 51, 51]


PNG_KEYS = {
    "palette": encoded(palette_image(ORANGE, (1, 2, 3)), transparency=1),
    "palette with an alpha each": encoded(palette_image(ORANGE, (1, 2, 3)), transparency=b"\xff\x00"),
    "rgb": png(2, 8, 2, bytes([*ORANGE, 1, 2, 3]), struct.pack(">3H", 1, 2, 3)),
    "16-bit rgb": png(2, 16, 2, struct.pack(">6H", *(257 * c for c in ORANGE), 1, 2, 3), struct.pack(">3H", 1, 2, 3)),
}
GREY_KEYS = {
    "1-bit": (png(2, 1, 0, bytes([0b10000000]), struct.pack(">H", 0)), 255),
    "1-bit white": (png(2, 1, 0, bytes([0b01000000]), struct.pack(">H", 1)), 0),
    "2-bit": (png(2, 2, 0, bytes([0b10010000]), struct.pack(">H", 1)), 170),
    "4-bit": (png(2, 4, 0, bytes([0xA5]), struct.pack(">H", 5)), 170),
    "8-bit": (png(2, 8, 0, bytes([170, 5]), struct.pack(">H", 5)), 170),
    "16-bit": (png(2, 16, 0, struct.pack(">2H", 257 * 170, 5), struct.pack(">H", 5)), 170),
}


@pytest.mark.parametrize("name", PNG_KEYS)
def test_a_transparent_colour_of_a_png_shows_the_background(name: str) -> None:
    assert decoded(PNG_KEYS[name])[0].tolist() == [list(ORANGE), list(BACKGROUND)]


@pytest.mark.parametrize("name", GREY_KEYS)
def test_a_transparent_grey_of_any_depth_shows_the_background(name: str) -> None:
    data, grey = GREY_KEYS[name]
    assert decoded(data)[0].tolist() == [[grey] * 3, list(BACKGROUND)]


def test_palettes() -> None:
    assert decoded(encoded(palette_image(ORANGE, (1, 2, 3))))[0].tolist() == [list(ORANGE), [1, 2, 3]]
    assert decoded(encoded(palette_image(ORANGE, (1, 2, 3)), "GIF"))[0].tolist() == [list(ORANGE), [1, 2, 3]]
    pixels = decoded(encoded(palette_image(ORANGE, (1, 2, 3)), "GIF", transparency=1))
    assert pixels[0].tolist() == [list(ORANGE), list(BACKGROUND)]
    with_alpha = palette_image(ORANGE, (1, 2, 3)).convert("PA")
    with_alpha.putpixel((1, 0), (1, 0))
    assert decoded(encoded(with_alpha, "TIFF"))[0].tolist() == [list(ORANGE), list(BACKGROUND)]


def test_lab() -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(Image.new("RGB", (2, 2), ORANGE), to_lab)
    assert lab is not None
    assert np.abs(decoded(encoded(lab, "TIFF")).astype(int) - ORANGE).max() <= 3


MODES_OF_NO_FILE = {
    "HSV": (14, 191, 200),
    "RGBa": (*ORANGE, 255),
    "La": (77, 255),
    "I;16L": 257 * 77,
    "I;16N": 257 * 77,
}


@pytest.mark.parametrize("mode", MODES_OF_NO_FILE)
def test_modes_that_files_rarely_open_in_are_converted_too(mode: str) -> None:
    image = to_rgb(Image.new(mode, (2, 2), MODES_OF_NO_FILE[mode]), BACKGROUND)  # type: ignore[arg-type]
    assert image.mode == "RGB"
    expected = ORANGE if mode in ("HSV", "RGBa") else (77, 77, 77)
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 2


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.floor(values / 257 + 0.5)
    for kind in ("PNG", "TIFF"):
        assert (decoded(encoded(Image.fromarray(values), kind)) == expected[..., None]).all()
    assert (to_8_bit(values.astype(np.int32)) == expected).all()
    assert (to_8_bit(values.astype(">u2")) == expected).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 0.5, 1], np.float32), [0, 128, 255]),
        (np.array([0, 0.5, 2], np.float32), [0, 0, 2]),
        (np.array([0, 100.4, 255], np.float32), [0, 100, 255]),
        (np.array([0, 25700, 65535], np.float32), [0, 100, 255]),
        (np.array([0, 5e5, 1e6], np.float32), [0, 128, 255]),
        (np.array([-1, np.nan, np.inf, -np.inf, 1], np.float32), [0, 0, 255, 0, 255]),
        (np.array([0, 100], np.uint16), [0, 0]),
        (np.array([-5, 200, 65535], np.int32), [0, 1, 255]),
        (np.array([0, 500_000, 1_000_000], np.int32), [0, 128, 255]),
        (np.zeros(2, np.float32), [0, 0]),
    ],
)
def test_the_scale_of_deep_greys(values: NDArray[np.generic], expected: list[int]) -> None:
    result = to_8_bit(values)
    assert result.dtype == np.uint8
    assert result.tolist() == expected


def test_exif_orientation_is_applied() -> None:
    upright = Image.new("RGB", (40, 20), (0, 0, 0))
    upright.paste(ORANGE, (0, 0, 10, 10))  # marks the top left corner
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for orientation, method in undo.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright.transpose(method) if method is not None else upright
        for kind in ("PNG", "JPEG"):
            pixels = decoded(encoded(stored, kind, exif=exif)).astype(int)
            assert np.abs(pixels - np.asarray(upright)).max() <= (0 if kind == "PNG" else 60), (orientation, kind)


def test_damaged_exif_data_is_no_reason_to_fail() -> None:
    data = encoded(Image.new("RGB", (8, 8), ORANGE), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0")
    assert np.abs(decoded(data).astype(int) - ORANGE).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (ORANGE, (0, 0, 255), (0, 255, 0))]
    options: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert (decoded(data) == ORANGE).all()


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
HUGE = png(1, 8, 2, b"").replace(struct.pack(">II", 1, 1), struct.pack(">II", 20_000, 20_000), 1)
_START = HUGE.index(b"IHDR")
HUGE = HUGE[: _START + 17] + struct.pack(">I", zlib.crc32(HUGE[_START : _START + 17])) + HUGE[_START + 21 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "p: image of 0 bytes is empty"),
        (b"<html>Not Found</html>", "p: image of 22 bytes is not an image in a format that is read"),
        (
            encoded(Image.fromarray(NOISE))[:5000],
            "p: image of 5,000 bytes is broken or truncated (image file is truncated",
        ),
        (
            encoded(Image.fromarray(NOISE), "JPEG")[:900],
            "p: image of 900 bytes is broken or truncated (image file is trunc",
        ),
        (encoded(Image.fromarray(NOISE))[:20], "p: image of 20 bytes is broken or truncated (Truncated File Read)"),
        (HUGE, "bytes is too large to be decoded safely (Image size (400000000 pixels) exceeds limit"),
        (encoded(Image.new("RGB", (101, 1))), "bytes is 101 x 1 pixels, longer than 100 times its short side"),
    ],
    ids=["empty", "html", "truncated png", "truncated jpeg", "only a header", "bomb", "line"],
)
def test_what_cannot_be_decoded_says_why_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        decode_rgb(data, background=BACKGROUND, place="p")
    assert reason in str(caught.value)
    assert str(caught.value).startswith("p: image of ")
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_paths(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.new("RGB", (2, 2), ORANGE)))
    assert decode_rgb(str(path), background=BACKGROUND).getpixel((0, 0)) == ORANGE
    with pytest.raises(DataError, match=r"^data:3: .*missing\.png: no such file$"):
        decode_rgb(str(tmp_path / "missing.png"), background=BACKGROUND, place="data:3")
    with pytest.raises(DataError, match=r"is a folder, not an image file$"):
        decode_rgb(str(tmp_path), background=BACKGROUND)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(
        DataError, match=r"pipe\.png: is a named pipe, not an image file$"
    ):  # and does not wait for a writer
        decode_rgb(str(tmp_path / "pipe.png"), background=BACKGROUND)
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"zero\.png: is a device, not an image file$"):
        decode_rgb(str(tmp_path / "zero.png"), background=BACKGROUND)
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(MAX_IMAGE_BYTES + 1)
    with pytest.raises(DataError, match=r"long\.png: has 1 GB, more than the 1 GB that an image may have$"):
        decode_rgb(str(tmp_path / "long.png"), background=BACKGROUND)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.png is empty$"):
        decode_rgb(str(path), background=BACKGROUND)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PCX"])
def test_other_formats_are_not_tried(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (8, 8), ORANGE), kind)
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(DataError, match=r"is not an image in a format that is read \(PNG, JPEG, .*\)$"):
        decode_rgb(data, background=BACKGROUND)


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_formats_that_are_read(kind: str) -> None:
    data = encoded(Image.new("RGB", (64, 64), ORANGE), kind)
    assert np.abs(decoded(data).astype(int) - ORANGE).max() <= 12


# width, height, resolution -> the resized size and crop offset (left, top), by hand from torchvision's rule
GEOMETRY = [
    (1024, 768, 512, (682, 512), (85, 0)),  # 512 * 1024 / 768 = 682.67, cut off; offset 85
    (768, 1024, 512, (512, 682), (0, 85)),
    (640, 427, 64, (95, 64), (16, 0)),  # offset 15.5 rounds to the even 16
    (100, 103, 64, (64, 65), (0, 0)),  # offset 0.5 rounds to the even 0
    (67, 64, 64, (67, 64), (2, 0)),  # offset 1.5 rounds to the even 2; not resized
    (64, 64, 64, (64, 64), (0, 0)),
    (10, 15, 64, (64, 96), (0, 16)),  # enlarged
    (300, 300, 8, (8, 8), (0, 0)),
]


@pytest.mark.parametrize(("width", "height", "resolution", "size", "offset"), GEOMETRY)
def test_geometry_is_torchvisions(
    width: int, height: int, resolution: int, size: tuple[int, int], offset: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    left, top = offset
    resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    result = resize_and_crop(image, resolution)
    assert result.dtype == np.uint8
    assert result.shape == (resolution, resolution, 3)
    assert result.flags.writeable
    assert (result == resized[top : top + resolution, left : left + resolution]).all()
    if size == (width, height):
        assert (result == pixels[top : top + resolution, left : left + resolution]).all()


def test_the_empty_prompt_is_drawn_first_and_always() -> None:
    captions = ("a", "b", "c")
    never = [choose_prompt(captions, np.random.default_rng(seed), 0.0) for seed in range(300)]
    some = [choose_prompt(captions, np.random.default_rng(seed), 0.3) for seed in range(300)]
    assert set(never) == set(captions)
    assert all(prompt in ("", kept) for prompt, kept in zip(some, never, strict=True))
    expected = ["" if np.random.default_rng(seed).random() < 0.3 else kept for seed, kept in enumerate(never)]
    assert some == expected
    assert 60 <= some.count("") <= 120
    rng, other = np.random.default_rng(0), np.random.default_rng(0)
    assert choose_prompt(("only",), rng, 0.0) == "only"
    other.random()
    assert rng.random() == other.random()  # a single caption takes the one draw
    assert {choose_prompt(captions, np.random.default_rng(seed), 1.0) for seed in range(50)} == {""}


def test_a_sample_from_pixels() -> None:
    clear = encoded(Image.new("RGBA", (40, 20), (1, 2, 3, 0)))

    def samples(row: ImageRow, empty: float) -> list[PreparedRow]:
        rows = PixelRows(cast("Source", SimpleNamespace(read=lambda _: row, remote=False)), 16)
        return [prepared(row) for row in BatchLoader(rows, SampleOrder(1, seed=0), 5, empty).batch(5)]

    row = ImageRow(clear, clear, ("a", "b"), "metadata.jsonl:7")
    first = samples(row, 0.0)[0]
    assert first.sample_index == 5
    assert first.image is not None
    assert first.image.shape == first.conditioning_image.shape == (16, 16, 3)
    assert (first.image == IMAGE_BACKGROUND).all()
    assert (first.conditioning_image == CONDITIONING_BACKGROUND).all()
    assert first.prompt in ("a", "b")
    assert pickle.dumps(samples(row, 0.5)) == pickle.dumps(samples(row, 0.5))
    with pytest.raises(DataError, match=r"^metadata\.jsonl:7, conditioning image: image of 1 bytes is not an image"):
        samples(ImageRow(clear, b"x", ("a",), "metadata.jsonl:7"), 0.0)
