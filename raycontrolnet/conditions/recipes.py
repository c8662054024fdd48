"""From a picture to its conditioning image: pure functions of uint8 RGB [H, W, 3] that give the same.

A new condition is a function here, its name and settings in condition_settings.py, and a line in `CONDITIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from raycontrolnet.data.records import UInt8Image
from raycontrolnet.data.transforms import IMAGE_BACKGROUND, TRANSFORMS_VERSION, decode_rgb, resize_short_side

CONDITIONS_VERSION = 1
"""Goes up when the pixels that come out change: what was made before then is made again."""


def canny(image: UInt8Image, *, low_threshold: float, high_threshold: float) -> UInt8Image:
    """Canny's edges (1986): 255 on edges, one pixel wide, and 0 elsewhere.

    As ControlNet's authors and the diffusers documentation make them: OpenCV with its Sobel filters of 3 x 3 pixels, on
    the colours, not on their grey: of each pixel's three gradients the largest counts, so that an edge between colours
    of the same lightness is one. Above `high_threshold` a gradient (0 to 2040) is an edge, above `low_threshold` if it
    goes on from one.
    """
    return _rgb(cv2.Canny(image, low_threshold, high_threshold))


def blur(image: UInt8Image, *, radius: float) -> UInt8Image:
    """A Gaussian blur whose standard deviation is `radius` pixels. Mirrored at the borders, it keeps the mean."""
    return _uint8(cv2.GaussianBlur(image, (0, 0), radius, borderType=cv2.BORDER_REFLECT))


def grey(image: UInt8Image) -> UInt8Image:
    """The luma of ITU-R BT.601 (0.299 red, 0.587 green, 0.114 blue), three times."""
    return _rgb(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


CONDITIONS: Mapping[str, Callable[..., UInt8Image]] = {"canny": canny, "blur": blur, "grey": grey}


@dataclass(frozen=True)
class Recipe:
    """How the conditioning images of a data set are made. Equal recipes make equal images."""

    condition: str
    """A name in `CONDITIONS`."""
    resolution: int
    """Short side of the conditioning images in pixels. They are whole: training cuts them as it does the pictures."""
    options: tuple[tuple[str, float], ...]
    """What the condition's function takes besides the image."""
    versions: tuple[int, int] = (TRANSFORMS_VERSION, CONDITIONS_VERSION)

    def make(self, picture: bytes | str) -> UInt8Image:
        """The conditioning image of an encoded picture, or of the file at a path.

        Raises:
            DataError: if it cannot be decoded; names it.
        """
        image = resize_short_side(decode_rgb(picture, background=IMAGE_BACKGROUND), self.resolution)
        return CONDITIONS[self.condition](np.array(image), **dict(self.options))


def _rgb(image: Any) -> UInt8Image:
    """One channel, uint8 [H, W], three times."""
    return np.repeat(_uint8(image)[..., None], 3, axis=-1)


def _uint8(image: Any) -> UInt8Image:
    return np.asarray(image, np.uint8)
