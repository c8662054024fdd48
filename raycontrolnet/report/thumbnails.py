"""The validation images of a run over its steps, small enough for a page with dozens of them."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from raycontrolnet.sampling.images import PairImages
from raycontrolnet.training import validation

MOST_STEPS = 8
MOST_PAIRS = 8
TILE_EDGE = 256
"""Pixels of an image's longer side; several images of one step share a tile that is a quarter larger."""
GAP = 4
"""Pixels between the images of a tile."""


@dataclass(frozen=True)
class PairHistory:
    """The images of one prompt and control image."""

    prompt: str
    control: str | None
    """Control image as a data URI; None if it cannot be read."""
    tiles: dict[int, str] = field(default_factory=dict)
    """Step -> its images, side by side, as a data URI; steps ascending."""


def pair_histories(output_dir: Path, last_step: int | None) -> list[PairHistory]:
    """Return the images of the first pairs in `output_dir`, at evenly spaced steps with the first and the last.

    Args:
        last_step: leave out later steps, which are from an earlier run; None for all.
    """
    pairs: dict[tuple[int, str], list[PairImages]] = {}
    for result in validation.all_results(output_dir, last_step):
        pairs.setdefault((result.pair, result.prompt), []).append(result)
    histories = []
    for (_, prompt), found in sorted(pairs.items())[:MOST_PAIRS]:
        tiles = {result.step: tile for result in _spread(found) if (tile := _tile(result.images))}
        if tiles:
            histories.append(PairHistory(prompt, _tile([found[-1].control]), tiles))
    return histories


def _spread(results: Sequence[PairImages]) -> list[PairImages]:
    chosen = np.linspace(0, len(results) - 1, min(len(results), MOST_STEPS)).round().astype(int)
    return [results[i] for i in chosen]


def _tile(paths: Sequence[Path]) -> str | None:
    """Return the images that can be read, in rows, as a data URI: PNG or JPEG, whichever is smaller."""
    images = [image for path in paths if (image := _open(path))]
    if not images:
        return None
    columns = round(math.sqrt(len(images)))
    edge = TILE_EDGE if columns == 1 else TILE_EDGE * 5 // 4 // columns
    for image in images:
        image.thumbnail((edge, edge))
    width, height = (size + GAP for size in images[0].size)
    tile = Image.new("RGB", (columns * width - GAP, math.ceil(len(images) / columns) * height - GAP), "gray")
    for index, image in enumerate(images):
        tile.paste(image, (index % columns * width, index // columns * height))
    files = []
    for kind in ("png", "jpeg"):
        with BytesIO() as file:
            tile.save(file, format=kind, quality=85)
            files.append((len(file.getvalue()), kind, base64.b64encode(file.getvalue()).decode()))
    _, kind, content = min(files)
    return f"data:image/{kind};base64,{content}"


def _open(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # SyntaxError: Pillow's error for a broken PNG
        return None
