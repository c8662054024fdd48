"""A run that has passed the checks: its settings, data and start, and what follows from them."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from raycontrolnet.cluster.shared_files import SharedFiles
from raycontrolnet.config.checks import versions
from raycontrolnet.config.train_config import TrainConfig, public_settings
from raycontrolnet.data.augmentation import Augmentation
from raycontrolnet.data.buckets import Buckets
from raycontrolnet.data.mixture import arrangement
from raycontrolnet.data.order import SampleOrder
from raycontrolnet.data.sample_rows import PixelRows
from raycontrolnet.data.size_conditioning import SizeConditioning
from raycontrolnet.data.source import Source
from raycontrolnet.data.stream import BatchLoader
from raycontrolnet.latents.cache import LatentCache
from raycontrolnet.latents.plan import LatentPlan
from raycontrolnet.model.families.family import Family
from raycontrolnet.sampling import images
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training import validation
from raycontrolnet.training.job import Job
from raycontrolnet.training.run_callback import RunCallback
from raycontrolnet.training.schedule import Schedule


@dataclass(frozen=True)
class CheckedRun:
    """A run whose input has been checked."""

    config: TrainConfig
    """With absolute paths and a seed."""
    folder: RunFolder
    source: Source
    family: Family
    """The base model's; the first one if this machine cannot look at it."""
    start: checkpoints.Checkpoint | None
    token: str | None = dataclasses.field(repr=False)
    not_cached_because: str | None = None
    """Reason why its latents would serve no other run, because no seed was given, in words."""
    cached: bool = False
    """True if the run trains from cached latents, provided that there is a folder for them."""
    buckets: Buckets | None = None
    """Size of each row; None for the resolution squared."""
    latents: LatentPlan | None = None
    """The cache to train from, not yet encoded; None also if the cluster must be seen before it can be chosen."""
    cache: LatentCache | None = None
    """The cache to train from; None for pixels."""
    precision_reason: str = ""
    """Reason for a precision that was not given, in words."""
    files: SharedFiles | None = None
    """Files that the driver sees, and that a node must see to load samples."""
    run_id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def output_dir(self) -> Path:
        """The folder to write to on this machine."""
        return self.folder.path

    @property
    def interpolation(self) -> str:
        """Resizing of images, as asked for or as the base model's family has it."""
        return self.config.image_interpolation_mode or self.family.interpolation

    @property
    def bad_rows(self) -> tuple[int, ...]:
        """Rows that the cache left out."""
        return self.cache.bad_rows if self.cache else ()

    @cached_property
    def order(self) -> SampleOrder:
        """The order of the run's samples."""
        config, seed = self.config, self.config.seed
        assert seed is not None
        return SampleOrder(
            len(self.source),
            seed,
            config.max_train_samples,
            self.bad_rows,
            config.num_held_out(len(self.source)),
            arrangement(self.source, config.data_weights, seed, self.buckets, config.train_batch_size),
        )

    @property
    def loader(self) -> BatchLoader:
        """The run's samples and batches."""
        config = self.config
        return BatchLoader(
            rows=self.cache or PixelRows(self.source, config.resolution, self.interpolation, self.buckets),
            order=self.order,
            batch_size=config.train_batch_size,
            proportion_empty_prompts=config.proportion_empty_prompts,
            source=self.source,
            files=self.files,
            sizes=SizeConditioning(
                config.resolution,
                (config.crops_coords_top_left_h, config.crops_coords_top_left_w),
                real=config.size_conditioning == "real",
            ),
            augmentation=Augmentation(config.crop, config.random_flip),
            buckets=self.buckets,
        )

    def schedule(self, checkpoint: checkpoints.Checkpoint | None) -> Schedule:
        """Return the schedule from `checkpoint` on."""
        return Schedule.of(self.config, self.order.num_samples, self.config.most_workers, checkpoint)

    def last_checkpoint(self) -> checkpoints.Checkpoint | None:
        """Return the last checkpoint of this run, or the one it started from."""
        return self.folder.latest(self.run_id) or self.start

    def how_to_go_on(self) -> str:
        """Return what to tell users when the run ends early."""
        try:
            last, newest = self.last_checkpoint(), self.folder.latest()
        except OSError:  # a store that has vanished
            return f"What stands in {self.folder.shown} cannot be seen now: go on with --resume_from_checkpoint latest."
        if last is None:
            return "There was no checkpoint yet."
        name = last.path.name if last.path.parent == self.output_dir else last.uri or str(last.path)
        if newest and newest.path == last.path:
            name = "latest"
        return (
            f"The checkpoint of update {last.step} stands: go on with --resume_from_checkpoint {name} "
            f"(--output_dir {self.folder.place})."
        )

    def job(
        self,
        *,
        use_gpu: bool,
        threads: int | None,
        loader: Any,
        actor_options: Mapping[str, Any] | None = None,
        callback: RunCallback | None = None,
    ) -> Job:
        """Return the job for the workers; `loader` is the run's, or a reference to it in Ray's object store."""
        config, order = self.config, self.order
        assert config.seed is not None
        return Job(
            config=dataclasses.replace(config, hub_token=None),
            folder=self.folder if isinstance(loader, BatchLoader) else self.folder.for_workers(),
            run_id=self.run_id,
            num_samples=order.num_samples,
            num_held_out=len(order.held_out),
            start=self.start,
            use_gpu=use_gpu,
            cached=self.cache is not None,
            interpolation=self.interpolation,
            bucket_sizes=self.buckets.sizes if self.buckets else (),
            threads=threads,
            validation_items=tuple(
                images.plan(config.validation_pairs, config.num_validation_images, config.seed, validation.FLAG)
            ),
            facts={
                "settings": public_settings(config),
                "data": self.source.fingerprint(),
                "left_out": list(self.bad_rows),
                "cached": self.cache is not None,
                "uses_of_a_sample": self.schedule(None).uses_of_a_sample,
                "held_out": config.num_held_out(len(self.source)),
                "buckets": [list(size) for size in self.buckets.sizes] if self.buckets else None,
                "versions": versions(),
            },
            token=self.token,
            loader=loader,
            actor_options=actor_options,
            callback=callback,
        )
