"""Validation images: what the ControlNet draws at a step, with fixed prompts, control images and seeds.

    plan (driver) -> generate: an image per item -> write (every worker its share) -> finish (rank 0)

The driver's plan holds the control images' bytes, so workers need not see the files. An image depends on its item and
on the weights alone: not on who draws it, nor on what was drawn before. `output_dir/validation/step-NNNNNN/` gets

    pair-00-image-00.png ...   the images
    pair-00-control.png        the control image as it was used: RGB, resized and cropped
    pair-00-grid.png           control image, then the images
    metadata.jsonl             one line per image; written last, so a folder that has it is complete
"""

from __future__ import annotations

import json
import logging
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
from raycontrolnet.settings import ValidationConfig

if TYPE_CHECKING:
    from raycontrolnet.model.components import Components

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationItem:
    """One image to draw. Pickles small: the items of a pair share `control_bytes`."""

    pair: int
    """Index of the (prompt, control image) pair."""
    image: int
    """Index of the image within its pair."""
    prompt: str
    control_image: str
    """The control image as the user named it."""
    seed: int
    """Seed of the initial noise, in [0, 2**32): the same at every step, so that steps compare."""
    control_bytes: bytes = field(repr=False)
    """The control image's file."""

    @property
    def file_name(self) -> str:
        return f"pair-{self.pair:02d}-image-{self.image:02d}.png"

    @property
    def control_file_name(self) -> str:
        return f"pair-{self.pair:02d}-control.png"

    def control(self, resolution: int) -> Image.Image:
        """The control image as the model gets it: RGB, `resolution` x `resolution`."""
        return Image.fromarray(
            resize_and_crop(decode_rgb(self.control_bytes, background=CONDITIONING_BACKGROUND), resolution)
        )


@dataclass(frozen=True)
class PairResult:
    """What a finished validation left for one pair."""

    step: int
    pair: int
    prompt: str
    control: Path
    images: tuple[Path, ...]
    grid: Path

    @property
    def key(self) -> str:
        """Name of the pair in the trackers; equal prompts do not collide."""
        return f"validation/pair-{self.pair:02d}"


def check(config: ValidationConfig) -> None:
    """Open every validation image, before anything is loaded.

    Raises:
        DataError: naming each image that cannot be used, and why.
    """
    problems = []
    for path in dict.fromkeys(path for _, path in config.validation_pairs):
        try:
            decode_rgb(path, background=CONDITIONING_BACKGROUND, place="--validation_image")
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))


def plan(config: ValidationConfig, seed: int) -> list[ValidationItem]:
    """Every image of one validation, in the order of the pairs. Empty without validation pairs.

    Raises:
        DataError: if a control image is not there any more.
    """
    items = []
    files = {path: _read(path) for _, path in config.validation_pairs}  # one object per file, also when pickled
    for pair, (prompt, path) in enumerate(config.validation_pairs):
        for image in range(config.num_validation_images):
            item_seed = int(np.random.SeedSequence((seed, pair, image)).generate_state(1)[0])
            items.append(ValidationItem(pair, image, prompt, path, item_seed, files[path]))
    return items


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"--validation_image: {path}: cannot be read ({error.strerror})") from None


def generate(
    components: Components,
    items: Iterable[ValidationItem],
    *,
    resolution: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> Iterator[tuple[ValidationItem, Image.Image]]:
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


def write(
    output_dir: str | Path,
    step: int,
    items: Sequence[ValidationItem],
    components: Components,
    *,
    resolution: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Draw and save worker `rank`'s share of `items` for `shard` = (rank, world size). No collectives.

    An error is logged and not raised: no picture is worth a training run.
    """
    rank, world_size = shard
    folder = step_folder(output_dir, step)
    own = items[rank::world_size]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            (folder / "metadata.jsonl").unlink(missing_ok=True)  # of a run that was here before and then went back
        for item in own:
            (folder / item.file_name).unlink(missing_ok=True)
        options: dict[str, Any] = {"resolution": resolution, "device": device, "autocast": autocast}
        for item, image in generate(components, own, sampling=sampling, **options):
            _save(image, folder / item.file_name)
    except Exception as error:  # noqa: BLE001 (whatever it was)
        _log_failure(step, error)


def finish(
    output_dir: str | Path,
    step: int,
    items: Sequence[ValidationItem],
    *,
    resolution: int,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> list[PairResult]:
    """On rank 0, once every worker has written: control images, grids and metadata.jsonl.

    Images that are missing (because a worker failed) are left out; without any, nothing is written. Like `write`, it
    logs errors and does not raise.

    Returns:
        One result per pair that has images.
    """
    folder = step_folder(output_dir, step)
    try:
        there = [item for item in items if (folder / item.file_name).is_file()]
        if not there:
            return []
        for pair in dict.fromkeys(item.pair for item in there):
            of_pair = [item for item in there if item.pair == pair]
            control = of_pair[0].control(resolution)
            _save(control, folder / of_pair[0].control_file_name)
            _save(_grid([control, *(_open(folder / item.file_name) for item in of_pair)]), folder / _grid_name(pair))
        lines = [json.dumps(_metadata(item, step, sampling), ensure_ascii=False) + "\n" for item in there]
        unfinished = folder / ".metadata.jsonl.unfinished"
        unfinished.write_text("".join(lines), encoding="utf-8")
        os.replace(unfinished, folder / "metadata.jsonl")
        return results(folder)
    except Exception as error:  # noqa: BLE001 (whatever it was)
        _log_failure(step, error)
        return []


def _log_failure(step: int, error: Exception) -> None:
    logger.warning("step %d: no validation images (%s: %s); training goes on", step, type(error).__name__, error)
    logger.debug("traceback of the failed validation", exc_info=error)


def _metadata(item: ValidationItem, step: int, sampling: Sampling) -> dict[str, Any]:
    return {
        "file_name": item.file_name,
        "conditioning_image_file_name": item.control_file_name,
        "prompt": item.prompt,
        "validation_image": item.control_image,
        "pair": item.pair,
        "image": item.image,
        "step": step,
        "seed": item.seed,
        "scheduler": sampling.scheduler,
        "num_inference_steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
    }


def step_folder(output_dir: str | Path, step: int) -> Path:
    """Folder of the validation images of `step`."""
    return Path(output_dir) / "validation" / f"step-{step:06d}"


def results(folder: Path) -> list[PairResult]:
    """What metadata.jsonl of a finished step folder tells, pair by pair."""
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    found = []
    for pair in dict.fromkeys(line["pair"] for line in lines):
        of_pair = [line for line in lines if line["pair"] == pair]
        first, images = of_pair[0], tuple(folder / line["file_name"] for line in of_pair)
        control = folder / first["conditioning_image_file_name"]
        found.append(PairResult(first["step"], pair, first["prompt"], control, images, folder / _grid_name(pair)))
    return found


def latest(output_dir: str | Path) -> list[PairResult]:
    """Results of the last finished validation under `output_dir`; empty if there is none."""
    finished = list((Path(output_dir) / "validation").glob("step-*/metadata.jsonl"))
    if not finished:
        return []
    return results(max(finished, key=lambda path: int(path.parent.name.removeprefix("step-"))).parent)


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
    image.save(unfinished, format="PNG")
    os.replace(unfinished, path)
