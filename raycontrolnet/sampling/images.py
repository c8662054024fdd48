"""Pictures that a ControlNet draws for pairs of prompts and control images, with fixed seeds, and their files.

    plan -> an item per image -> write (draws and saves) -> finish (grids, scores, metadata) -> results (reads them)

Validation draws with it during training, `raycontrolnet generate` afterwards. An image depends on its item, the draw
options and the weights alone: not on who draws it, nor on what was drawn before. The folder gets

    pair-00-image-00.png ...   the images
    pair-00-control.png        the control image as it was used: RGB, resized and cropped
    pair-00-grid.png           control image, then the images
    metadata.jsonl             one line per image; written last, so a folder that has it is complete

with more digits for the pair where there are more than a hundred.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from raycontrolnet.data.transforms import CONDITIONING_BACKGROUND, decode_rgb, resize_and_crop
from raycontrolnet.errors import DataError
from raycontrolnet.sampling import scores
from raycontrolnet.sampling.pipeline import DrawOptions, build_pipeline, draw
from raycontrolnet.sampling.scores import Fidelity
from raycontrolnet.storage.files import check_open, replace_text, replacing

if TYPE_CHECKING:
    from raycontrolnet.model.components import Components

METADATA = "metadata.jsonl"
FILES = "pair-*-image-*.png"
CONTROL_ENDING, GRID_ENDING = "-control.png", "-grid.png"
MOST_COLUMNS = 5
"""Columns of a grid."""


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
    """Digits of the pair's index in file names, so that they sort."""

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

    def control(self, options: DrawOptions) -> Image.Image:
        """Return the control image as the model gets it: RGB, resized and cropped."""
        image = decode_rgb(self.control_bytes, background=CONDITIONING_BACKGROUND)
        return Image.fromarray(resize_and_crop(image, options.size_for(image), options.interpolation))


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
    """Control fidelity of each image, in [0, 1]; None where it was not measured."""
    step: int = field(default=0, kw_only=True)
    """Updates of the ControlNet, for images of a validation; else 0."""

    @property
    def name(self) -> str:
        """Beginning of the names of the pair's files."""
        return self.control.name.removesuffix(CONTROL_ENDING)


def check(pairs: Iterable[tuple[str, str]], flag: str) -> None:
    """Open the control image of every (prompt, path), before models are loaded.

    Raises:
        DataError: naming `flag` and each image that cannot be used, and why.
    """
    problems = []
    for path in dict.fromkeys(path for _, path in pairs):
        try:
            decode_rgb(path, background=CONDITIONING_BACKGROUND, place=flag)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


def plan(pairs: Sequence[tuple[str, str]], num_images: int, seed: int, flag: str) -> list[ImageItem]:
    """Return every image to draw for `pairs` (prompt, control image path), each with a seed that depends on its place.

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
    options: DrawOptions,
    ends_early: Callable[[], bool] | None = None,
) -> Iterator[tuple[ImageItem, Image.Image]]:
    """Draw `items` with the models in memory, which keep their mode, gradients and random state.

    Args:
        components: the models themselves, not wrapped in DistributedDataParallel.
        ends_early: asked after every step of the sampler; if it answers True, `DrawingStopped` is raised.

    Yields:
        (item, RGB image of the size of its control image as it is used)
    """
    pipeline = build_pipeline(components)
    with_controls = ((item, item.control(options)) for item in items)
    for _, of_one_size in groupby(with_controls, key=lambda pair: pair[1].size):
        while batch := list(islice(of_one_size, options.batch_size)):
            drawn, controls = [item for item, _ in batch], [control for _, control in batch]
            prompts, seeds = [item.prompt for item in drawn], [item.seed for item in drawn]
            found = draw(pipeline, components, prompts, controls, seeds, options, ends_early)
            yield from zip(drawn, found, strict=True)


def write(
    folder: Path,
    items: Iterable[ImageItem],
    components: Components,
    options: DrawOptions,
    ends_early: Callable[[], bool] | None = None,
) -> Iterator[ImageItem]:
    """Draw `items` and save each as soon as it is drawn, in place of an earlier image; yield it once it is saved.

    `ends_early` as of `draw_items`.
    """
    for item, image in draw_items(components, items, options, ends_early):
        check_open(folder)
        (folder / METADATA).unlink(missing_ok=True)  # it describes the image that is replaced
        _save(image, folder / item.file_name)
        yield item


def finish(
    folder: Path, items: Iterable[ImageItem], options: DrawOptions, *, step: int | None = None
) -> list[PairImages]:
    """Write control images, grids, scores and metadata.jsonl for the images that are there.

    Items without an image are left out; without any image nothing is written.

    Args:
        step: updates of the ControlNet, for a validation.

    Returns:
        One result per pair that has images.
    """
    there = [item for item in items if (folder / item.file_name).is_file()]
    if not there:
        return []
    lines = []
    for pair in dict.fromkeys(item.pair for item in there):
        of_pair = [item for item in there if item.pair == pair]
        control = of_pair[0].control(options)
        pictures = [_open(folder / item.file_name) for item in of_pair]
        _save(control, folder / of_pair[0].control_file_name)
        _save(_grid([control, *pictures]), folder / of_pair[0].grid_file_name)
        for item, score in zip(of_pair, scores.score(control, pictures, options.measure), strict=True):
            lines.append(json.dumps(_metadata(item, step, options, score), ensure_ascii=False) + "\n")
    replace_text(folder / METADATA, "".join(lines))
    return results(folder)


def _metadata(item: ImageItem, step: int | None, options: DrawOptions, score: float | None) -> dict[str, Any]:
    return {
        "file_name": item.file_name,
        "conditioning_image_file_name": item.control_file_name,
        "prompt": item.prompt,
        "control_image": item.control_image,
        "pair": item.pair,
        "image": item.image,
        **({} if step is None else {"step": step}),
        "seed": item.seed,
        "scheduler": options.sampler,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        **({} if score is None else {"control_fidelity": score}),
    }


def results(folder: Path) -> list[PairImages]:
    """Read metadata.jsonl of a finished folder: one result per pair."""
    lines = [json.loads(line) for line in (folder / METADATA).read_text(encoding="utf-8").splitlines()]
    return [_pair_images(folder, list(of_pair)) for _, of_pair in groupby(lines, key=lambda line: line["pair"])]


def _pair_images(folder: Path, lines: Sequence[dict[str, Any]]) -> PairImages:
    first = lines[0]
    control = folder / first["conditioning_image_file_name"]
    measured: tuple[Any, ...] = tuple(line.get("control_fidelity") for line in lines)
    return PairImages(
        first["pair"],
        first["prompt"],
        control,
        tuple(folder / line["file_name"] for line in lines),
        folder / (control.name.removesuffix(CONTROL_ENDING) + GRID_ENDING),
        control_fidelity=measured if all(isinstance(score, float) for score in measured) else None,
        step=first.get("step", 0),
    )


def fidelity_of(pairs: Sequence[PairImages]) -> Fidelity | None:
    """Return the average control fidelity of all images of `pairs`; None if it was not measured."""
    return scores.average(score for pair in pairs for score in pair.control_fidelity or ())


def _grid(images: Sequence[Image.Image]) -> Image.Image:
    """Lay out images of one size row by row."""
    width, height = images[0].size
    columns = min(len(images), MOST_COLUMNS)
    grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid


def _open(path: Path) -> Image.Image:
    return Image.open(BytesIO(path.read_bytes())).convert("RGB")


def _save(image: Image.Image, path: Path) -> None:
    with replacing(path) as partial:
        image.save(partial, format="PNG")
