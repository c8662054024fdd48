"""Images as files: what a ControlNet draws for pairs of prompts and control images, with fixed seeds.

    plan -> an item per image -> write (draws and saves) -> finish (grids, metadata, scores)

`run/validation.py` does so while a ControlNet is trained, `generate_images.py` afterwards. An image depends on its
item, the sampling and the weights alone: not on who draws it, nor on what was drawn before. The folder gets

    pair-00-image-00.png ...   the images
    pair-00-control.png        the control image as it was used: RGB, resized and cropped
    pair-00-grid.png           control image, then the images
    metadata.jsonl             one line per image; written last, so a folder that has it is complete

with more digits for the pair where there are more than a hundred.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from raycontrolnet.data.transforms import CONDITIONING_BACKGROUND, decode_rgb, resize_and_crop
from raycontrolnet.errors import DataError
from raycontrolnet.sampling import scores
from raycontrolnet.sampling.pipeline import DEFAULT_SAMPLING, Sampling, build_pipeline, draw
from raycontrolnet.sampling.scores import Fidelity
from raycontrolnet.storage.files import replacing

if TYPE_CHECKING:
    from raycontrolnet.model.components import Components

METADATA = "metadata.jsonl"
CONTROL_ENDING, GRID_ENDING = "-control.png", "-grid.png"


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
    digits: int = 2
    """Of the pair's index in file names, so that they sort."""

    @property
    def pair_name(self) -> str:
        return f"pair-{self.pair:0{self.digits}d}"

    @property
    def file_name(self) -> str:
        return f"{self.pair_name}-image-{self.image:02d}.png"

    @property
    def control_file_name(self) -> str:
        return self.pair_name + CONTROL_ENDING

    @property
    def grid_file_name(self) -> str:
        return self.pair_name + GRID_ENDING

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
    control_fidelity: tuple[float, ...] | None = field(default=None, kw_only=True)
    """How well each image obeys the control image, in [0, 1]; None where it was not measured."""

    @property
    def name(self) -> str:
        """What the names of the pair's files begin with."""
        return self.control.name.removesuffix(CONTROL_ENDING)


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
    digits = max(2, len(str(len(pairs) - 1)))
    for pair, (prompt, path) in enumerate(pairs):
        for image in range(num_images):
            item_seed = int(np.random.SeedSequence((seed, pair, image)).generate_state(1)[0])
            items.append(ImageItem(pair, image, prompt, path, item_seed, files[path], digits))
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
    batch_size: int = 1,
) -> Iterator[tuple[ImageItem, Image.Image]]:
    """Draw `items` with the models in memory, which stay as they are (mode, gradients, random state).

    Args:
        components: the models themselves, not wrapped in DistributedDataParallel.
        resolution: of the images, in pixels.
        device: where the models are.
        autocast: fp16 or bf16 with mixed precision, None without.
        batch_size: how many are drawn at a time. The images are the same but for rounding.

    Yields:
        (item, RGB image of resolution x resolution)
    """
    pipeline, waiting = build_pipeline(components), iter(items)
    while batch := list(islice(waiting, batch_size)):
        images = draw(
            pipeline,
            [item.prompt for item in batch],
            [item.control(resolution) for item in batch],
            [item.seed for item in batch],
            device=device,
            autocast=autocast,
            sampling=sampling,
        )
        yield from zip(batch, images, strict=True)


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
    measure: str | None = None,
) -> list[PairImages]:
    """Control images, grids, scores and metadata.jsonl, once images are written.

    Those of `items` whose images are missing are left out; without any, nothing is written.

    Args:
        step: of a validation.
        measure: of `control_fidelity`; None for no scores.

    Returns:
        One result per pair that has images.
    """
    there = [item for item in items if (folder / item.file_name).is_file()]
    if not there:
        return []
    lines = []
    for pair in dict.fromkeys(item.pair for item in there):
        of_pair = [item for item in there if item.pair == pair]
        control = of_pair[0].control(resolution)
        pictures = [_open(folder / item.file_name) for item in of_pair]
        _save(control, folder / of_pair[0].control_file_name)
        _save(_grid([control, *pictures]), folder / of_pair[0].grid_file_name)
        for item, score in zip(of_pair, scores.scored(control, pictures, measure), strict=True):
            lines.append(json.dumps(_metadata(item, step, sampling, score), ensure_ascii=False) + "\n")
    with replacing(folder / METADATA) as partial:
        partial.write_text("".join(lines), encoding="utf-8")
    return results(folder)


def _metadata(item: ImageItem, step: int | None, sampling: Sampling, score: float | None) -> dict[str, Any]:
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
        **({} if score is None else {"control_fidelity": score}),
    }


def results(folder: Path) -> list[PairImages]:
    """What metadata.jsonl of a finished folder tells, pair by pair."""
    lines = [json.loads(line) for line in (folder / METADATA).read_text(encoding="utf-8").splitlines()]
    found = []
    for pair in dict.fromkeys(line["pair"] for line in lines):
        of_pair = [line for line in lines if line["pair"] == pair]
        first, images = of_pair[0], tuple(folder / line["file_name"] for line in of_pair)
        control = folder / first["conditioning_image_file_name"]
        grid = folder / (control.name.removesuffix(CONTROL_ENDING) + GRID_ENDING)
        measured = tuple(line.get("control_fidelity") for line in of_pair)
        fidelity = measured if all(isinstance(score, float) for score in measured) else None
        found.append(PairImages(pair, first["prompt"], control, images, grid, control_fidelity=fidelity))
    return found


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
    with replacing(path) as partial:
        image.save(partial, format="PNG")


def fidelity_of(pairs: Sequence[PairImages]) -> Fidelity | None:
    """The control fidelity of all images of `pairs`, if it was measured."""
    return scores.average(score for pair in pairs for score in pair.control_fidelity or ())
