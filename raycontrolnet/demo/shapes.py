"""A data set for trying a ControlNet: the outline of a shape -> the filled shape, in the caption's colours."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from raycontrolnet.storage.files import replace_text

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "blue": (30, 60, 220),
    "green": (30, 160, 50),
    "yellow": (250, 225, 40),
    "orange": (250, 140, 20),
    "purple": (130, 40, 170),
    "pink": (250, 150, 190),
    "brown": (120, 70, 30),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "cyan": (40, 210, 220),
    "magenta": (225, 30, 190),
    "navy": (15, 25, 95),
    "olive": (125, 125, 20),
    "teal": (15, 115, 120),
}
"""Name -> RGB, 0 to 255; distinguishable in a small image."""

OVERSAMPLING = 4
"""Factor by which images are drawn larger and then reduced, for smooth edges."""

Point = tuple[float, float]


class Row(NamedTuple):
    """One row of the data set; both images RGB, of `resolution` pixels square."""

    image: Image.Image
    conditioning_image: Image.Image
    text: str


def _circle(size: float) -> list[Point]:
    """Return a circle of radius `size`, as a fine polygon."""
    angles = np.linspace(0, 2 * math.pi, 180, endpoint=False)
    return [(size * math.cos(angle), size * math.sin(angle)) for angle in angles]


def _square(size: float) -> list[Point]:
    """Return a square with the area of the circle."""
    half = size * math.sqrt(math.pi) / 2
    return [(-half, -half), (half, -half), (half, half), (-half, half)]


def _triangle(size: float) -> list[Point]:
    """Return an equilateral triangle, one corner up, with four fifths of the circle's area: it needs room to move."""
    radius = 1.4 * size
    return [
        (radius * math.cos(angle), radius * math.sin(angle)) for angle in (math.pi / 6, math.pi * 5 / 6, -math.pi / 2)
    ]


SHAPES: dict[str, Callable[[float], list[Point]]] = {"circle": _circle, "square": _square, "triangle": _triangle}
"""Name -> corners about the origin, y downwards, of a shape of a size."""


def write_shapes(folder: Path, num_rows: int = 64, *, resolution: int = 64, seed: int = 0) -> Path:
    """Write `images/NNNNN.png`, `conditioning/NNNNN.png` and `metadata.jsonl` below `folder`, and return `folder`.

    Row i depends on (seed, i, resolution) alone: a larger data set begins with the rows of a smaller one. The
    images are RGB, `resolution` pixels square. `metadata.jsonl` is written last, so a folder that has it is complete.
    """
    folder = Path(folder)
    for column in ("images", "conditioning"):
        (folder / column).mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(num_rows):
        image, conditioning_image, text = draw_row(index, resolution, seed)
        row = {"image": f"images/{index:05}.png", "conditioning_image": f"conditioning/{index:05}.png", "text": text}
        image.save(folder / row["image"])
        conditioning_image.save(folder / row["conditioning_image"])
        lines.append(json.dumps(row) + "\n")
    replace_text(folder / "metadata.jsonl", "".join(lines))
    return folder


def read_rows(folder: Path) -> list[tuple[Path, str]]:
    """Read conditioning image and caption of every row that `write_shapes` wrote."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return [(folder / row["conditioning_image"], row["text"]) for row in map(json.loads, lines)]


def draw_row(index: int, resolution: int, seed: int, shapes: Sequence[str] = tuple(SHAPES)) -> Row:
    """Draw row `index`: a shape of one colour at a random place on a background of another, inside the image."""
    rng = np.random.default_rng((seed, index))
    colour, background = (list(COLOURS)[i] for i in rng.choice(len(COLOURS), 2, replace=False))
    shape = shapes[int(rng.integers(len(shapes)))]
    corners = place(shape, resolution, rng)
    image = render(corners, resolution, COLOURS[colour], COLOURS[background])
    return Row(image, outline(corners, resolution), f"{colour} {shape} with {background} background")


def place(shape: str, resolution: int, rng: np.random.Generator) -> list[Point]:
    """Return the corners, in pixels, of `shape` at a random place and size, inside the image."""
    corners = np.array(SHAPES[shape](rng.uniform(0.16, 0.34) * resolution))
    lowest, highest = -corners.min(axis=0), resolution - corners.max(axis=0)
    return [(float(x), float(y)) for x, y in corners + rng.uniform(lowest, highest)]


def render(
    corners: Sequence[Point], resolution: int, colour: tuple[int, int, int], background: tuple[int, int, int]
) -> Image.Image:
    """Draw the filled shape."""
    image = Image.new("RGB", (resolution * OVERSAMPLING,) * 2, background)
    ImageDraw.Draw(image).polygon(_enlarged(corners), fill=colour)
    return image.reduce(OVERSAMPLING)


def outline(corners: Sequence[Point], resolution: int) -> Image.Image:
    """Draw the inner edge of the shape, white on black, a pixel wide for every 64 of the image."""
    image = Image.new("RGB", (resolution * OVERSAMPLING,) * 2, "black")
    width = OVERSAMPLING * max(1, round(resolution / 64))
    ImageDraw.Draw(image).polygon(_enlarged(corners), outline="white", width=width)
    return image.reduce(OVERSAMPLING)


def _enlarged(corners: Sequence[Point]) -> list[Point]:
    return [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in corners]
