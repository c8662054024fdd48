"""From an image file's bytes to arrays that can be stacked: pure functions, in the order of their use.

    ImageRow -> decode_rgb -> resize_and_crop -> DecodedRow -> choose_prompt -> PreparedRow

`prepare_images` is the list. Nothing here knows of tensors, workers or the order of samples.
"""

from __future__ import annotations

import io
import stat
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from raycontrolnet.data.augmentation import CENTRED, View
from raycontrolnet.data.paths import kind_of_file, missing_reason
from raycontrolnet.data.records import DecodedRow, EncodedImage, ImageRow, Size, UInt8Image
from raycontrolnet.data.remote_path import RemotePath
from raycontrolnet.data.size_conditioning import crop_corner, resized_size
from raycontrolnet.errors import DataError
from raycontrolnet.text import error_message, file_size

# Pillow warns of odd metadata and of sizes that are fine here. `catch_warnings` would not be safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

TRANSFORMS_VERSION = 1
"""Raised when the resulting pixels change: latents cached before then no longer fit."""

Colour = tuple[int, int, int]

IMAGE_BACKGROUND: Colour = (255, 255, 255)
"""Shown through transparent target images: most were made for white pages."""
CONDITIONING_BACKGROUND: Colour = (0, 0, 0)
"""Shown through transparent conditioning images: in edge, depth and pose maps black means nothing is there."""

MAX_ASPECT_RATIO = 100
"""Limit of long side to short side: a longer picture is a broken file, and would fill gigabytes when resized."""

Image.init()
IMAGE_FORMATS = tuple(
    name
    for name in ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "TGA", "JPEG2000")
    if name in Image.OPEN
)
"""Pillow's names of the formats that photographs and maps come in (JPEG: also MPO, of phones). Others are refused
unread: some start programs, as Ghostscript for EPS, whatever the file's name says."""

MAX_IMAGE_BYTES = 1_000_000_000
"""Limit of an image file: what is longer is none, and would fill the memory of the loading tasks."""

_GREY_LEVEL = {"L;2": 85, "L;4": 17}
_UNMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def decode_rgb(image: EncodedImage, *, background: Colour, place: str = "") -> Image.Image:
    """Decode the first frame of an image (bytes, or the path of a file) as 8-bit RGB, upright as its EXIF data says.

    Transparent pixels show `background`. Modes deeper than 8 bits are scaled, not clipped; see `to_8_bit`. Colour
    profiles are not applied, as in diffusers' scripts.

    Raises:
        DataError: `place: reason`, one line, if there is no such file or it cannot be decoded.
    """
    prefix = f"{place}: " if place else ""
    data = image if isinstance(image, bytes) else _read_file(image, prefix)
    name = f"{prefix}image of {len(data):,} bytes" if isinstance(image, bytes) else f"{prefix}{image}"
    if not data:
        raise DataError(f"{name} is empty")
    try:
        opened = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        _scale_transparent_colour(opened)
        opened.load()
        _turn_upright(opened)
        rgb = to_rgb(opened, background)
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} is too large to be decoded safely ({error_message(error)})") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is not an image in a format that is read ({', '.join(IMAGE_FORMATS)})") from None
    except Exception as error:  # noqa: BLE001 - decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise DataError(f"{name} is broken or truncated ({error_message(error)})") from None
    if max(rgb.size) > MAX_ASPECT_RATIO * min(rgb.size):
        width, height = rgb.size
        raise DataError(f"{name} is {width} x {height} pixels, longer than {MAX_ASPECT_RATIO} times its short side")
    return rgb


def to_rgb(image: Image.Image, background: Colour) -> Image.Image:
    """Convert an opened image of any Pillow mode to 8-bit RGB; its transparent pixels show `background`."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey_to_rgb(image, background)
    if image.mode in _UNMULTIPLIED:
        image = image.convert(_UNMULTIPLIED[image.mode])
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, background)
    canvas.paste(rgba, mask=rgba)
    return canvas


def to_8_bit(values: NDArray[np.generic]) -> UInt8Image:
    """Convert grey values of modes I;16, I and F to uint8 of the same shape, rounded.

    Full white follows from the file's depth, as far as it can be known, so that images of one data set agree:

    - 16-bit integers: 65535 (divided by 257), however dark the picture is.
    - 32-bit integers: 65535 (16-bit data stored or opened deeper); if a value is above, the picture's own maximum.
    - floats: 1 if nothing is above 1, else 255, else 65535, else the picture's own maximum.

    Negative values and NaN are black, infinity is white.
    """
    scales: tuple[float, ...] = (1, 255, 65535) if np.issubdtype(values.dtype, np.floating) else (65535,)
    exact = values.astype(np.float64)
    peak = float(np.max(exact, where=np.isfinite(exact), initial=0))
    white = next((scale for scale in scales if peak <= scale), peak)
    scaled = np.nan_to_num(exact * (255 / white), nan=0)  # infinities become huge numbers, which clip
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def resize_and_crop(
    image: Image.Image, size: Size | int, interpolation: str = "bilinear", view: View = CENTRED
) -> UInt8Image:
    """Return a part of an RGB image, by default its middle, as uint8 [height, width, 3].

    It is resized to cover `size`, with antialiasing, then it is cropped, then mirrored if the view is. The rounding is
    that of torchvision's `Resize(resolution)` and `CenterCrop(resolution)` on PIL images.

    Args:
        size: height and width; one number is both.
        interpolation: one of `INTERPOLATION_MODES`.
        view: place of the crop, and whether it is mirrored.
    """
    height, width = size = (size, size) if isinstance(size, int) else size
    top, left = crop_corner((image.height, image.width), size, view)
    image = _resize_to_cover(image, size, interpolation)
    cropped = np.array(image.crop((left, top, left + width, top + height)))
    return mirrored(cropped) if view.flipped else cropped


def mirrored(image: UInt8Image) -> UInt8Image:
    """Return the mirror image, left to right, of [H, W, 3]."""
    return np.ascontiguousarray(image[:, ::-1])


def resize_short_side(image: Image.Image, resolution: int) -> Image.Image:
    """Resize an RGB image so that its short side is `resolution`, the first half of `resize_and_crop`; bilinear."""
    return _resize_to_cover(image, (resolution, resolution), "bilinear")


def _resize_to_cover(image: Image.Image, size: Size, interpolation: str) -> Image.Image:
    height, width = resized_size((image.height, image.width), size)
    filter_ = Image.Resampling[interpolation.removesuffix("_exact").upper()]
    return image if (width, height) == image.size else image.resize((width, height), filter_)


def choose_prompt(captions: tuple[str, ...], rng: np.random.Generator, proportion_empty_prompts: float) -> str:
    """Draw the empty prompt with probability `proportion_empty_prompts`, else one of `captions`, equally likely.

    The draw for the empty prompt is always made, and comes first: another proportion then leaves the captions of the
    remaining samples as they are.
    """
    empty = rng.random() < proportion_empty_prompts
    caption = captions[rng.integers(len(captions))] if len(captions) > 1 else captions[0]
    return "" if empty else caption


def prepare_images(
    row: ImageRow, size: Size | int, interpolation: str = "bilinear", view: View = CENTRED
) -> DecodedRow:
    """Return a row with its images resized, cropped and mirrored alike; see `resize_and_crop`.

    Raises:
        DataError: naming the row's place, if one of its images cannot be decoded.
    """
    image = decode_rgb(row.image, background=IMAGE_BACKGROUND, place=f"{row.place}, image")
    conditioning_image = decode_rgb(
        row.conditioning_image, background=CONDITIONING_BACKGROUND, place=f"{row.place}, conditioning image"
    )
    return DecodedRow(
        captions=row.captions,
        conditioning_image=resize_and_crop(conditioning_image, size, interpolation, view),
        image=resize_and_crop(image, size, interpolation, view),
        original_size=(image.height, image.width),
    )


def _read_file(path: str | RemotePath, prefix: str) -> bytes:
    try:
        if isinstance(path, RemotePath):
            file = path.open_file()
            _check_size(file.size, f"{prefix}{path}")
            return file.read(file.size, 0)
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):  # opening a named pipe waits, reading a device never ends
            raise DataError(f"{prefix}{path}: is {kind_of_file(found.st_mode)}, not an image file")
        _check_size(found.st_size, f"{prefix}{path}")
        return Path(path).read_bytes()
    except FileNotFoundError:
        reason = "no such file" if isinstance(path, RemotePath) else missing_reason("", path)
        raise DataError(f"{prefix}{path}: {reason}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(f"{prefix}{path}: cannot be read ({error_message(error)})") from None


def _check_size(num_bytes: int, name: str) -> None:
    if num_bytes > MAX_IMAGE_BYTES:
        most = file_size(MAX_IMAGE_BYTES)
        raise DataError(f"{name}: has {file_size(num_bytes)}, more than the {most} that an image may have")


def _turn_upright(image: Image.Image) -> None:
    with suppress(Exception):  # damaged EXIF data raises errors of many kinds; the pixels may be good
        ImageOps.exif_transpose(image, in_place=True)


def _scale_transparent_colour(image: ImageFile.ImageFile) -> None:
    """Bring a PNG's transparent colour to the 8 bits of its pixels; Pillow leaves it in the file's depth."""
    key = image.info.get("transparency")
    raw_mode = image.tile[0][3] if image.format == "PNG" and image.tile else None
    if isinstance(key, int) and raw_mode in _GREY_LEVEL:
        image.info["transparency"] = key * _GREY_LEVEL[raw_mode]
    elif isinstance(key, tuple) and raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _deep_grey_to_rgb(image: Image.Image, background: Colour) -> Image.Image:
    values = np.asarray(image)
    rgb = np.repeat(to_8_bit(values)[..., None], 3, axis=-1)
    if isinstance(key := image.info.get("transparency"), int):
        rgb[values == key] = background
    return Image.fromarray(rgb)


def encode_conditioning(image: UInt8Image) -> bytes:
    """Encode an RGB image [H, W, 3] as PNG, in grey if all of it is grey, as most edge and depth maps are."""
    grey = bool((image[..., :1] == image).all())
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image[..., 0]) if grey else image).save(stream, "PNG")
    return stream.getvalue()


def decode_conditioning(png: bytes) -> UInt8Image:
    """Decode what `encode_conditioning` made."""
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))
