"""A data set to try a ControlNet on: the outline of a circle -> the filled circle, in the colours of the caption."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

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
"""Name -> RGB, 0 to 255; far enough apart to be told apart in a small image."""

OVERSAMPLING = 4
"""Images are drawn this many times larger and reduced, for smooth edges."""


def write_circles(folder: Path, num_rows: int = 64, *, resolution: int = 64, seed: int = 0) -> Path:
    """Write `images/NNNNN.png`, `conditioning/NNNNN.png` and `metadata.jsonl` below `folder`, and return `folder`.

    Row i depends on (seed, i, resolution) alone: a larger data set begins with the rows of a smaller one. The images
    are RGB, `resolution` pixels square. `metadata.jsonl` comes last and at once, so a folder that has it is whole.
    """
    folder = Path(folder)
    for column in ("images", "conditioning"):
        (folder / column).mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(num_rows):
        image, conditioning_image, text = draw_circle(index, resolution, seed)
        row = {"image": f"images/{index:05}.png", "conditioning_image": f"conditioning/{index:05}.png", "text": text}
        image.save(folder / row["image"])
        conditioning_image.save(folder / row["conditioning_image"])
        lines.append(json.dumps(row) + "\n")
    unfinished = folder / ".metadata.jsonl.unfinished"
    unfinished.write_text("".join(lines), encoding="utf-8")
    os.replace(unfinished, folder / "metadata.jsonl")
    return folder


def draw_circle(index: int, resolution: int, seed: int) -> tuple[Image.Image, Image.Image, str]:
    """Image, conditioning image (both RGB, `resolution` pixels square) and caption of row `index`."""
    rng = np.random.default_rng((seed, index))
    circle, background = (list(COLOURS)[i] for i in rng.choice(len(COLOURS), 2, replace=False))
    size = resolution * OVERSAMPLING
    radius = rng.uniform(0.12, 0.35) * size
    x, y = rng.uniform(radius, size - radius, 2)  # the whole circle is inside the image
    box = (x - radius, y - radius, x + radius, y + radius)

    image = Image.new("RGB", (size, size), COLOURS[background])
    ImageDraw.Draw(image).ellipse(box, fill=COLOURS[circle])
    outline = Image.new("RGB", (size, size), "black")
    line_width = OVERSAMPLING * max(1, round(resolution / 64))
    ImageDraw.Draw(outline).ellipse(box, outline="white", width=line_width)
    return image.reduce(OVERSAMPLING), outline.reduce(OVERSAMPLING), f"{circle} circle with {background} background"
