"""Images as files: what a ControlNet draws for pairs of prompts and control images, with fixed seeds.

    plan -> an item per image -> write (draws and saves, one by one) -> finish

`run/validation.py` does so while a ControlNet is trained, `generate_images.py` afterwards. An image depends on its
item, the sampling and the weights alone: not on who draws it, nor on what was drawn before. The folder gets

    pair-00-image-00.png ...   the images
    pair-00-control.png        the control image as it was used: RGB, resized and cropped
    pair-00-grid.png           control image, then the images
    metadata.jsonl             one line per image; written last, so a folder that has it is complete
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from raycontrolnet.data.transforms import CONDITIONING_BACKGROUND, decode_rgb, resize_and_crop
from raycontrolnet.errors import DataError
from raycontrolnet.run.drawing import DEFAULT_SAMPLING, Sampling, build_pipeline, draw

if TYPE_CHECKING:
    from raycontrolnet.model.components import Components

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class ImageItem:
    """One image to draw. Pickles small: the items of a pair share `control_bytes`."""

    pair: int
    """Index of the (prompt, control image) pair."""
    image: int
    """Index of the image within its pair."""
    prompt: str
    control_image: str
    """The control image as the user named it."""
    seed: int
    """Seed of the initial noise, in [0, 2**32)."""
    control_bytes: bytes = field(repr=False)
    """The control image's file."""

    @property
    def file_name(self) -> str:
        return f"pair-{self.pair:02d}-image-{self.image:02d}.png"

    @property
    def control_file_name(self) -> str:
        return f"pair-{self.pair:02d}-control.png"

    @property
    def grid_file_name(self) -> str:
        return _grid_name(self.pair)

    def control(self, resolution: int) -> Image.Image:
        """The control image as the model gets it: RGB, `resolution` x `resolution`."""
        return Image.fromarray(
            resize_and_crop(decode_rgb(self.control_bytes, background=CONDITIONING_BACKGROUND), resolution)
        )


@dataclass(frozen=True)
class PairImages:
    """The finished images of one pair."""

    pair: int
    """Index of the pair."""
    prompt: str
    control: Path
    """The control image as it was used."""
    images: tuple[Path, ...]
    grid: Path
    """Control image and images side by side."""


def check(paths: Iterable[str], flag: str) -> None:
    """Open every control image, before anything is loaded.

    Raises:
        DataError: naming `flag` and each image that cannot be used, and why.
    """
    problems = []
    for path in dict.fromkeys(paths):
        try:
            decode_rgb(path, background=CONDITIONING_BACKGROUND, place=flag)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


def plan(pairs: Sequence[tuple[str, str]], num_images: int, seed: int, flag: str) -> list[ImageItem]:
    """Every image of `pairs` (prompt, control image path), in their order; each has its own seed, by its place.

    Raises:
        DataError: naming `flag`, if a control image is not there any more.
    """
    items = []
    files = {path: _read(path, flag) for _, path in pairs}  # one object per file, also when pickled
    for pair, (prompt, path) in enumerate(pairs):
        for image in range(num_images):
            item_seed = int(np.random.SeedSequence((seed, pair, image)).generate_state(1)[0])
            items.append(ImageItem(pair, image, prompt, path, item_seed, files[path]))
    return items


def _read(path: str, flag: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{flag}: {path}: cannot be read ({error.strerror})") from None


def draw_items(
    components: Components,
    items: Iterable[ImageItem],
    *,
    resolution: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> Iterator[tuple[ImageItem, Image.Image]]:
    """Draw `items` one by one with the models in memory, which stay as they are (mode, gradients, random state).

    Args:
        components: the models themselves, not wrapped in DistributedDataParallel.
        resolution: of the images, in pixels.
        device: where the models are.
        autocast: fp16 or bf16 with mixed precision, None without.

    Yields:
        (item, RGB image of resolution x resolution)
    """
    pipeline = build_pipeline(components)
    for item in items:
        image = draw(
            pipeline,
            item.prompt,
            item.control(resolution),
            item.seed,
            device=device,
            autocast=autocast,
            sampling=sampling,
        )
        yield item, image


def write(folder: Path, items: Iterable[ImageItem], components: Components, **options: Any) -> Iterator[ImageItem]:
    """Draw `items` and save each, in the place of an earlier one, as soon as it is drawn.

    Args:
        folder: exists.
        **options: as `draw_items`.

    Yields:
        Each item once its image is there.
    """
    for item, image in draw_items(components, items, **options):
        (folder / METADATA).unlink(missing_ok=True)  # which tells of the image that is replaced
        _save(image, folder / item.file_name)
        yield item


def finish(
    folder: Path,
    items: Iterable[ImageItem],
    *,
    resolution: int,
    sampling: Sampling = DEFAULT_SAMPLING,
    step: int | None = None,
) -> list[PairImages]:
    """Control images, grids and metadata.jsonl, once images are written.

    Those of `items` whose images are missing are left out; without any, nothing is written.

    Args:
        step: of a validation.

    Returns:
        One result per pair that has images.
    """
    there = [item for item in items if (folder / item.file_name).is_file()]
    if not there:
        return []
    for pair in dict.fromkeys(item.pair for item in there):
        of_pair = [item for item in there if item.pair == pair]
        control = of_pair[0].control(resolution)
        _save(control, folder / of_pair[0].control_file_name)
        grid = _grid([control, *(_open(folder / item.file_name) for item in of_pair)])
        _save(grid, folder / of_pair[0].grid_file_name)
    lines = [json.dumps(_metadata(item, step, sampling), ensure_ascii=False) + "\n" for item in there]
    unfinished = folder / f".{METADATA}.unfinished"
    unfinished.write_text("".join(lines), encoding="utf-8")
    os.replace(unfinished, folder / METADATA)
    return results(folder)


def _metadata(item: ImageItem, step: int | None, sampling: Sampling) -> dict[str, Any]:
    return {
        "file_name": item.file_name,
        "conditioning_image_file_name": item.control_file_name,
        "prompt": item.prompt,
        "control_image": item.control_image,
        "pair": item.pair,
        "image": item.image,
        **({} if step is None else {"step": step}),
        "seed": item.seed,
        "scheduler": sampling.scheduler,
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
    }


def results(folder: Path) -> list[PairImages]:
    """What metadata.jsonl of a finished folder tells, pair by pair."""
    lines = [json.loads(line) for line in (folder / METADATA).read_text(encoding="utf-8").splitlines()]
    found = []
    for pair in dict.fromkeys(line["pair"] for line in lines):
        of_pair = [line for line in lines if line["pair"] == pair]
        first, images = of_pair[0], tuple(folder / line["file_name"] for line in of_pair)
        control = folder / first["conditioning_image_file_name"]
        found.append(PairImages(pair, first["prompt"], control, images, folder / _grid_name(pair)))
    return found


def _grid_name(pair: int) -> str:
    return f"pair-{pair:02d}-grid.png"


def _grid(images: Sequence[Image.Image], most_columns: int = 5) -> Image.Image:
    """Images of one size, row by row."""
    width, height = images[0].size
    columns = min(len(images), most_columns)
    grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid


def _open(path: Path) -> Image.Image:
    return Image.open(BytesIO(path.read_bytes())).convert("RGB")


def _save(image: Image.Image, path: Path) -> None:
    """As PNG, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        image.save(unfinished, format="PNG")
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)  # the disk may be full
        raise
