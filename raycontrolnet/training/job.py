"""The job that the driver hands to the workers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.records import Size
from raycontrolnet.data.stream import BatchLoader
from raycontrolnet.errors import UserError
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.performance import working_precision
from raycontrolnet.sampling.images import ImageItem
from raycontrolnet.sampling.pipeline import DrawOptions
from raycontrolnet.storage.checkpoint import Checkpoint
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training import validation
from raycontrolnet.training.run_callback import RunCallback


@dataclass(frozen=True)
class Job:
    """Plain data for every worker, without secrets but for the token, which repr leaves out."""

    config: TrainConfig
    """With absolute paths, a seed, and no hub_token."""
    folder: RunFolder
    """The run's folder, as the workers use it."""
    run_id: str
    num_samples: int
    """N, samples per epoch."""
    num_held_out: int
    start: Checkpoint | None
    """Start of the run; after a failure it continues from its own last checkpoint."""
    use_gpu: bool
    cached: bool
    """True if samples come from the latent cache."""
    interpolation: str
    """Resizing of images."""
    bucket_sizes: tuple[Size, ...]
    """Sizes of the aspect buckets; none for the resolution squared."""
    threads: int | None
    """CPU threads of a worker; None leaves them."""
    validation_items: tuple[ImageItem, ...]
    facts: Mapping[str, Any]
    """Settings, data and versions for the checkpoints' manifests."""
    token: str | None = field(default=None, repr=False)
    submitted: float = field(default_factory=time.time)
    """Unix seconds."""
    loader: BatchLoader | Any = None
    """For workers on Ray a reference to it in Ray's object store."""
    actor_options: Mapping[str, Any] | None = None
    """Ray's options for an actor that draws validation images beside the training; None if there is no room."""
    callback: RunCallback | None = None
    """Callback of a run in the caller's process."""

    @property
    def local(self) -> bool:
        """True for a run in the caller's process, without Ray Data."""
        return isinstance(self.loader, BatchLoader)

    @property
    def output_dir(self) -> Path:
        """The folder to write to on this machine."""
        return self.folder.path

    def images_of(self, step: int, family: Family) -> validation.StepImages:
        """Return the validation images of `step`, to be drawn with a base model of `family`."""
        asked = self.config.guidance_scale
        options = DrawOptions(
            self.config.resolution,
            guidance_scale=family.guidance_scale if asked is None else asked,
            precision=working_precision(self.config.mixed_precision),
            measure=self.config.control_fidelity,
            interpolation=self.interpolation,
            sampler=family.sampler,
            bucket_sizes=self.bucket_sizes,
        )
        return validation.StepImages(self.output_dir, step, self.validation_items, options)

    def current_checkpoint(self) -> Checkpoint | None:
        """Return this run's last undamaged checkpoint on this machine, or its start.

        Raises:
            UserError: if the one in an object store is damaged.
        """
        found = self.folder.last(self.run_id) or self.start
        if found is None or not self.folder.is_stored:
            return found
        try:
            return self.folder.sound(found)
        except ValueError as error:
            problem = f"--output_dir={self.folder.shown}: {found.path.name}: {error}"
            raise UserError(f"{problem}; go on with --resume_from_checkpoint of an earlier one") from None
