"""The conditions: pure functions from uint8 RGB [H, W, 3] to the same.

A new condition needs a function here, a line in `CONDITIONS`, and its name and settings in config/condition_config.py.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from raycontrolnet.data.records import UInt8Image
from raycontrolnet.data.transforms import IMAGE_BACKGROUND, TRANSFORMS_VERSION, decode_rgb, resize_short_side

CONDITIONS_VERSION = 1
"""Version of the pixels; raise it when they change, and older images are made again."""


def canny(image: UInt8Image, *, low_threshold: float, high_threshold: float) -> UInt8Image:
    """Find Canny's edges (1986): 255 on edges, one pixel wide, and 0 elsewhere.

    As ControlNet's authors and the diffusers documentation make them: OpenCV with Sobel filters of 3 x 3 pixels, on the
    colours. The largest of a pixel's three gradients counts, so an edge between colours of the same lightness is found.
    A gradient (0 to 2040) above `high_threshold` is an edge, one above `low_threshold` if it continues an edge.
    """
    return _rgb(cv2.Canny(image, low_threshold, high_threshold))


def blur(image: UInt8Image, *, radius: float) -> UInt8Image:
    """Blur by a Gaussian with a standard deviation of `radius` pixels. Mirrored at the borders, it keeps the mean."""
    return _uint8(cv2.GaussianBlur(image, (0, 0), radius, borderType=cv2.BORDER_REFLECT))


def grey(image: UInt8Image) -> UInt8Image:
    """Repeat the luma of ITU-R BT.601 (0.299 red, 0.587 green, 0.114 blue) three times."""
    return _rgb(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


CONDITIONS: Mapping[str, Callable[..., UInt8Image]] = {"canny": canny, "blur": blur, "grey": grey}


@dataclass(frozen=True)
class Recipe:
    """Settings that decide conditioning images. Equal recipes make equal images."""

    condition: str
    """A name in `CONDITIONS`."""
    resolution: int
    """Short side of the conditioning images in pixels. They are not cropped: training crops both images alike."""
    options: tuple[tuple[str, float], ...]
    """Arguments of the condition's function besides the image."""
    versions: tuple[int, int] = (TRANSFORMS_VERSION, CONDITIONS_VERSION)

    def make(self, picture: bytes | str) -> UInt8Image:
        """Make the conditioning image of an encoded picture, or of the file at a path.

        Raises:
            DataError: naming the picture, if it cannot be decoded.
        """
        image = resize_short_side(decode_rgb(picture, background=IMAGE_BACKGROUND), self.resolution)
        return CONDITIONS[self.condition](np.array(image), **dict(self.options))

    def key(self, path: str) -> str:
        """Return a key that changes with the recipe and with the picture's size and time."""
        try:
            state = os.stat(path)  # noqa: PTH116 (of every picture, each time)
        except (OSError, ValueError):  # ValueError: a name that no file can have
            return "unseen"  # matches no key in the journal
        identity = repr((self, state.st_size, state.st_mtime_ns))
        return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()


def _rgb(image: Any) -> UInt8Image:
    """Repeat one channel, uint8 [H, W], three times."""
    return np.repeat(_uint8(image)[..., None], 3, axis=-1)


def _uint8(image: Any) -> UInt8Image:
    return np.asarray(image, np.uint8)
