"""A data set of pictures of several shapes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = ((40, 40), (50, 30), (30, 50), (90, 70), (24, 96))
"""Height and width of the pictures, which repeat."""
SIDEWAYS_JPEG = 6
"""EXIF's orientation of a picture that is shown turned by a quarter."""


def write_pictures(folder: Path, num_rows: int, shapes: Sequence[tuple[int, int]] = SHAPES) -> Path:
    """Write rows of noisy pictures; every third is a JPEG that lies on its side, as phones take them."""
    rng = np.random.default_rng(0)
    for name in ("images", "conditioning"):
        (folder / name).mkdir(parents=True)
    rows = []
    for index in range(num_rows):
        height, width = shapes[index % len(shapes)]
        pixels = rng.integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((width, height))
        control = Image.fromarray(((np.asarray(picture.convert("L")) > 127) * 255).astype(np.uint8))
        control.save(folder / "conditioning" / f"{index}.png")
        name = f"images/{index}.png"
        if index % 3 == 2:
            name = f"images/{index}.jpg"
            exif = Image.Exif()
            exif[0x0112] = SIDEWAYS_JPEG
            picture.transpose(Image.Transpose.ROTATE_90).save(folder / name, exif=exif, quality=95)
        else:
            picture.save(folder / name)
        rows.append({"image": name, "conditioning_image": f"conditioning/{index}.png", "text": f"picture {index}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
