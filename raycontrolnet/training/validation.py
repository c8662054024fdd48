"""Validation images: where the images of a step lie, and how workers draw them without risk to the training.

The items hold the control images' bytes, so workers need not see the files. The images of a step, which
`sampling/images.py` draws and saves, lie in `output_dir/validation/step-NNNNNN/`. A failed validation is logged and
does not end the training.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from raycontrolnet.config.output_settings import ValidationConfig
from raycontrolnet.sampling import images
from raycontrolnet.sampling.images import METADATA, ImageItem, PairImages, fidelity_of
from raycontrolnet.sampling.pipeline import DrawingStopped, DrawOptions
from raycontrolnet.sampling.scores import Fidelity
from raycontrolnet.storage.files import check_open
from raycontrolnet.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from raycontrolnet.model.components import Components

logger = logging.getLogger(__name__)

VALIDATION_FOLDER = "validation"
FLAG = "--validation_image"
MADE_UP_FILE = ".made_up"
"""The step whose images a run that goes on has begun to draw: if that ends it, the next part does not try again."""


@dataclass(frozen=True)
class StepImages:
    """The validation images of one step: every worker draws its share, then rank 0 finishes the folder."""

    output_dir: Path
    step: int
    items: Sequence[ImageItem]
    options: DrawOptions

    def draw(
        self,
        components: Components,
        rank: int = 0,
        world_size: int = 1,
        ends_early: Callable[[], bool] | None = None,
    ) -> bool:
        """Draw and save worker `rank`'s share; return False if it was ended early. No collectives; a failure is logged.

        Args:
            ends_early: asked after every step of the sampler; leaves out the rest.
        """
        folder, own = step_folder(self.output_dir, self.step), self.items[rank::world_size]
        with failures_logged(self.step):
            check_open(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                (folder / METADATA).unlink(missing_ok=True)  # of a run that was here before and then went back
            for item in own:
                (folder / item.file_name).unlink(missing_ok=True)  # `finish` takes every image that it finds
            try:
                deque(images.write(folder, own, components, self.options, ends_early), maxlen=0)
            except DrawingStopped:
                return False
        return True

    def finish(self) -> list[PairImages]:
        """Finish the folder once every worker has drawn; return one result per pair that has images."""
        pairs: list[PairImages] = []
        with failures_logged(self.step):
            pairs += images.finish(step_folder(self.output_dir, self.step), self.items, self.options, step=self.step)
        return pairs


@contextmanager
def failures_logged(step: int) -> Iterator[None]:
    """Log what goes wrong in a validation instead of raising it: training goes on, and other workers wait."""
    try:
        yield
    except Exception as error:
        logger.warning("step %d: no validation images (%s: %s); training goes on", step, type(error).__name__, error)
        logger.debug("traceback of the failed validation", exc_info=error)


def step_folder(output_dir: str | Path, step: int) -> Path:
    """Return the folder of the validation images of `step`."""
    return Path(output_dir) / VALIDATION_FOLDER / f"step-{step:06d}"


def files_of(step: int) -> str:
    """Return a pattern of the names of the validation files of `step`, in a run's folder."""
    return f"{VALIDATION_FOLDER}/step-{step:06d}/*"


def metadata_of(step: int) -> str:
    """Return the name of the file that makes the validation of `step` finished, in a run's folder."""
    return files_of(step).replace("*", METADATA)


def send(folder: RunFolder, step: int) -> None:
    """Send the validation of `step` to an object store: what counts as finished is there whole."""
    images, metadata = files_of(step).replace("*", "*.png"), metadata_of(step)
    folder.push(images)
    folder.push(metadata)


def finished_folders(output_dir: str | Path, last_step: int | None = None) -> list[Path]:
    """List the folders of all finished validations up to `last_step`, steps ascending."""
    files = (Path(output_dir) / VALIDATION_FOLDER).glob(f"step-*/{METADATA}")
    numbers = {file.parent: file.parent.name.removeprefix("step-") for file in files}
    by_step = {int(number): folder for folder, number in numbers.items() if number.isdecimal()}  # others are not ours
    return [by_step[step] for step in sorted(by_step) if last_step is None or step <= last_step]


def latest(output_dir: str | Path, last_step: int | None = None) -> list[PairImages]:
    """Read the last finished validation under `output_dir`; empty if there is none.

    Args:
        last_step: of the run; later ones are of an earlier run in the same folder.
    """
    folders = finished_folders(output_dir, last_step)
    return images.results(folders[-1]) if folders else []


def all_results(output_dir: str | Path, last_step: int | None = None) -> list[PairImages]:
    """Read every finished validation up to `last_step`, steps ascending; skip those that cannot be read."""
    found = []
    for folder in finished_folders(output_dir, last_step):
        try:
            found += images.results(folder)
        except (OSError, ValueError, KeyError, TypeError):  # not whole, or not ours
            continue
    return found


def fidelity_by_step(output_dir: str | Path, last_step: int | None = None) -> dict[int, Fidelity]:
    """Return step -> control fidelity of its images, for the steps that have it; steps ascending."""
    by_step = groupby(all_results(output_dir, last_step), key=lambda pair: pair.step)
    return {step: found for step, pairs in by_step if (found := fidelity_of(list(pairs)))}


def summary(config: ValidationConfig, output_dir: str | Path, last_step: int) -> dict[str, float]:
    """Return control_fidelity of the last images, for run.json and the model card; empty unless it is asked for."""
    by_step = fidelity_by_step(output_dir, last_step) if config.control_fidelity else {}
    return {"control_fidelity": by_step[max(by_step)].mean} if by_step else {}
