"""Validation images: what the ControlNet draws at a step, with fixed prompts, control images and seeds.

    plan (driver) -> write (every worker its share) -> finish (rank 0)

The driver's plan holds the control images' bytes, so workers need not see the files. The images of a step, which
`sampling/images.py` draws and saves, lie in `output_dir/validation/step-NNNNNN/`. No picture is worth a training run:
what goes wrong is logged and not raised.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from raycontrolnet.config.output_settings import ValidationConfig
from raycontrolnet.sampling import images
from raycontrolnet.sampling.images import METADATA, ImageItem, PairImages, fidelity_of
from raycontrolnet.sampling.pipeline import DEFAULT_SAMPLING, Sampling
from raycontrolnet.sampling.scores import Fidelity

if TYPE_CHECKING:
    from raycontrolnet.model.components import Components

logger = logging.getLogger(__name__)

FOLDER = "validation"
FLAG = "--validation_image"


@dataclass(frozen=True)
class PairResult(PairImages):
    """What a finished validation left for one pair."""

    step: int
    """Updates that the ControlNet had had."""

    @property
    def key(self) -> str:
        """Name of the pair in the trackers; equal prompts do not collide."""
        return f"validation/{self.name}"


def check(config: ValidationConfig) -> None:
    """Open every validation image, before anything is loaded.

    Raises:
        DataError: naming each image that cannot be used, and why.
    """
    images.check((path for _, path in config.validation_pairs), FLAG)


def plan(config: ValidationConfig, seed: int) -> list[ImageItem]:
    """Every image of one validation, the same at every step so that steps compare. Empty without validation pairs.

    Raises:
        DataError: if a control image is not there any more.
    """
    return images.plan(config.validation_pairs, config.num_validation_images, seed, FLAG)


def write(
    output_dir: str | Path,
    step: int,
    items: Sequence[ImageItem],
    components: Components,
    *,
    resolution: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Draw and save worker `rank`'s share of `items` for `shard` = (rank, world size). No collectives."""
    rank, world_size = shard
    folder = step_folder(output_dir, step)
    own = items[rank::world_size]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            (folder / METADATA).unlink(missing_ok=True)  # of a run that was here before and then went back
        for item in own:
            (folder / item.file_name).unlink(missing_ok=True)  # finish takes what is there for this step's
        for _ in images.write(
            folder, own, components, resolution=resolution, device=device, autocast=autocast, sampling=sampling
        ):
            pass
    except Exception as error:  # noqa: BLE001 (whatever it was)
        log_failure(step, error)


def finish(
    output_dir: str | Path,
    step: int,
    items: Sequence[ImageItem],
    *,
    resolution: int,
    sampling: Sampling = DEFAULT_SAMPLING,
    measure: str | None = None,
) -> list[PairResult]:
    """On rank 0, once every worker has written: control images, grids, scores and metadata.jsonl.

    Images that are missing (because a worker failed) are left out; without any, nothing is written.

    Args:
        measure: of `control_fidelity`; None for no scores.

    Returns:
        One result per pair that has images.
    """
    folder = step_folder(output_dir, step)
    try:
        finished = images.finish(folder, items, resolution=resolution, sampling=sampling, step=step, measure=measure)
        return results(folder) if finished else []
    except Exception as error:  # noqa: BLE001 (whatever it was)
        log_failure(step, error)
        return []


def log_failure(step: int, error: Exception) -> None:
    """Say that a validation failed, and that this is no reason to stop."""
    logger.warning("step %d: no validation images (%s: %s); training goes on", step, type(error).__name__, error)
    logger.debug("traceback of the failed validation", exc_info=error)


def step_folder(output_dir: str | Path, step: int) -> Path:
    """Folder of the validation images of `step`."""
    return Path(output_dir) / FOLDER / f"step-{step:06d}"


def results(folder: Path) -> list[PairResult]:
    """What metadata.jsonl of a finished step folder tells, pair by pair."""
    step = int(folder.name.removeprefix("step-"))
    return [PairResult(**vars(pair), step=step) for pair in images.results(folder)]


def latest(output_dir: str | Path, last_step: int | None = None) -> list[PairResult]:
    """Results of the last finished validation under `output_dir`; empty if there is none.

    Args:
        last_step: of the run; later ones are of an earlier run in the same folder.
    """
    folders = finished_folders(output_dir, last_step)
    return results(folders[-1]) if folders else []


def all_results(output_dir: str | Path, last_step: int | None = None) -> list[PairResult]:
    """Every pair of every finished validation up to `last_step`, steps ascending; what cannot be read is left out."""
    found = []
    for folder in finished_folders(output_dir, last_step):
        try:
            found += results(folder)
        except (OSError, ValueError, KeyError, TypeError):  # not whole, or not ours
            continue
    return found


def fidelity_by_step(output_dir: str | Path, last_step: int | None = None) -> dict[int, Fidelity]:
    """Step -> control fidelity of the images drawn at it, for those that have it; steps ascending."""
    pairs: dict[int, list[PairResult]] = {}
    for result in all_results(output_dir, last_step):
        pairs.setdefault(result.step, []).append(result)
    return {step: found for step, of_step in pairs.items() if (found := fidelity_of(of_step))}


def summary(config: ValidationConfig, output_dir: str | Path, last_step: int) -> dict[str, float]:
    """control_fidelity of the last images, as run.json and the model card have it; empty where it is not asked for."""
    by_step = fidelity_by_step(output_dir, last_step) if config.control_fidelity else {}
    return {"control_fidelity": by_step[max(by_step)].mean} if by_step else {}


def finished_folders(output_dir: str | Path, last_step: int | None = None) -> list[Path]:
    """The folders of all finished validations up to `last_step`, steps ascending."""
    files = (Path(output_dir) / FOLDER).glob(f"step-*/{METADATA}")
    numbers = {file.parent: file.parent.name.removeprefix("step-") for file in files}
    by_step = {int(number): folder for folder, number in numbers.items() if number.isdecimal()}  # others are not ours
    return [by_step[step] for step in sorted(by_step) if last_step is None or step <= last_step]
