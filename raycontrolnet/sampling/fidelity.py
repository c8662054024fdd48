"""Control fidelity: how well a picture obeys its control image, measured by finding the condition in the picture.

    shape   the control image is an outline, the picture a filled shape: intersection over union of the two regions
    canny   the control image is edges: F-measure between them and the picture's own edges

A picture of something else does not score exactly 0: regions overlap, and edges lie near each other, by chance too.
"""

from __future__ import annotations

from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from raycontrolnet.data.records import UInt8Image

Mask = npt.NDArray[np.bool_]
"""[H, W]"""

Measure = Literal["shape", "canny"]

BORDER_SHARE = 1 / 32
"""Width of the frame that shows the background's colour, as a share of the shorter side."""
PLAIN_DISTANCE = 24.0
"""Smallest distance of a shape's colour from the background's, in RGB (0 to 255 each)."""
CANNY_THRESHOLDS = (100, 200)
TOLERANCE_SHARE = 0.0075
"""Largest distance of matching edges, as a share of the diagonal, as in the Berkeley benchmark."""


def control_fidelity(control_image: UInt8Image, image: UInt8Image, measure: Measure) -> float:
    """Measure how well `image` obeys `control_image`, in [0, 1].

    Args:
        control_image: uint8 [H, W, 3], RGB: white lines on black.
        image: uint8 [H, W, 3], RGB, of the same size.
        measure: `shape` (see `asked_shape` and `found_shape`) or `canny` (see `edge_f_measure`).

    Raises:
        ValueError: for arrays of another form, or an unknown measure.
    """
    for name, array in (("control_image", control_image), ("image", image)):
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"{name}: must be uint8 [H, W, 3], not {array.dtype} {list(array.shape)}")
    if control_image.shape != image.shape:
        sizes = [f"{array.shape[1]} x {array.shape[0]}" for array in (control_image, image)]
        raise ValueError(f"control_image and image must be of one size, not {sizes[0]} and {sizes[1]}")
    if measure == "shape":
        return iou(asked_shape(control_image), found_shape(image))
    if measure == "canny":
        found = cv2.Canny(image, *CANNY_THRESHOLDS) > 0  # of the colours, as `raycontrolnet condition` makes them
        return edge_f_measure(_grey(control_image) > 127, found)
    raise ValueError(f"measure={measure!r}: must be shape or canny")


def asked_shape(control_image: UInt8Image) -> Mask:
    """Return the region that the outline in a control image encloses, the outline included: bool [H, W].

    Lines may be smooth: they are followed where they are a quarter white, so that thin ones have no gaps, and their
    outer edge is where they are half white. The picture's edge closes an outline that it cuts off.

    Args:
        control_image: uint8 [H, W, 3], RGB: white lines, or a white region, on black.
    """
    grey = _grey(control_image)
    lines = grey > 63
    contours, _ = cv2.findContours(lines.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(lines.shape, np.uint8)
    cv2.drawContours(filled, contours, -1, 1, cv2.FILLED)
    region = filled > 0
    if np.array_equal(region, lines):  # nothing is enclosed
        region = lines | _cut_off(~lines)
    beside_it = cv2.dilate((~region).astype(np.uint8), _CROSS, borderValue=0) > 0
    return region & ~(beside_it & (grey <= 127))


def _cut_off(free: Mask) -> Mask:
    """Return all regions between lines but the background, which is the one with most of the border."""
    count, labels = cv2.connectedComponents(free.astype(np.uint8), connectivity=4)
    border = np.concatenate((labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]))
    background = np.bincount(border[border > 0], minlength=count).argmax()
    return free & (labels != background)


def found_shape(image: UInt8Image) -> Mask:
    """Return the largest connected region of another colour than the background: bool [H, W].

    It is empty in a plain picture, and in noise. The background's colour is the median of the picture's frame, so a
    shape may touch the border. A pixel belongs to a shape if its distance from the background, in RGB, is more than
    half that of the shape's own colour, which is the middle of a smooth edge. A hole in the background's colour is not
    part of the shape.

    Args:
        image: uint8 [H, W, 3], RGB.
    """
    distance = np.linalg.norm(image.astype(np.float32) - _background(image), axis=2)
    # Otsu (1979) parts near from far; it needs whole numbers, here tenths.
    tenths, _ = cv2.threshold((distance * 10).astype(np.uint16), 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    is_far = distance > tenths / 10
    half = np.median(distance[is_far]) / 2 if is_far.any() else 0.0
    if 2 * half < PLAIN_DISTANCE or np.median(distance[~is_far]) > half:  # plain; or noise, which has no background
        return np.zeros(distance.shape, np.bool_)
    different = (distance > half - 1).astype(np.uint8)  # rounding of smooth edges is less
    # Drop what is thinner than 3 pixels, and do not connect by corners: noise would be one large shape.
    different = cv2.morphologyEx(different, cv2.MORPH_OPEN, _CROSS)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(different, connectivity=4)
    largest = 1 + stats[1:, cv2.CC_STAT_AREA].argmax() if count > 1 else count  # label 0 is the rest
    return labels == largest


def _background(image: UInt8Image) -> npt.NDArray[np.float32]:
    """RGB [3]: the median of each channel over the picture's frame."""
    width = max(1, round(min(image.shape[:2]) * BORDER_SHARE))
    frame = np.ones(image.shape[:2], np.bool_)
    frame[width:-width, width:-width] = False
    return np.median(image[frame], axis=0).astype(np.float32)


def iou(asked: Mask, found: Mask) -> float:
    """Return the intersection over union of two regions; 1 if both are empty."""
    union = np.count_nonzero(asked | found)
    return float(np.count_nonzero(asked & found) / union) if union else 1.0


def edge_f_measure(asked: Mask, found: Mask) -> float:
    """Return the harmonic mean of precision and recall of edges, in [0, 1]; 1 if both are empty, 0 if one is.

    Precision is the share of found edge pixels with an asked one within 0.0075 of the diagonal (at least a pixel),
    recall the share of asked ones with a found one. The tolerance is that of the Berkeley benchmark (Martin, Fowlkes &
    Malik 2004, doi:10.1109/TPAMI.2004.1273918). Its one-to-one matching is left out: one edge may match two beside it.

    Args:
        asked: bool [H, W].
        found: bool [H, W].
    """
    if not asked.any() or not found.any():
        return float(asked.any() == found.any())
    tolerance = max(1.0, TOLERANCE_SHARE * float(np.hypot(*asked.shape)))
    precision = float((_distance_to(asked)[found] <= tolerance).mean())
    recall = float((_distance_to(found)[asked] <= tolerance).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _distance_to(edges: Mask) -> npt.NDArray[np.float32]:
    """Measure the distance in pixels from each place to the nearest of `edges`: float32 [H, W]."""
    distance: Any = cv2.distanceTransform((~edges).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return distance


def _grey(image: UInt8Image) -> UInt8Image:
    """Convert to grey: uint8 [H, W]."""
    grey: Any = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return grey


_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
