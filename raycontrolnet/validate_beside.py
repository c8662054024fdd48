"""Validation images beside the training: drawn by an actor where the cluster has room for one worker more.

The actor reads the base model once, and then draws with each ControlNet that it is sent: training waits for nothing but
the copy of the weights. While the actor is busy, the workers share the drawing, as they do without it. If it is lost,
so are the images that it was at, and the workers do the rest.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import torch

from raycontrolnet.cluster import WorkerResources
from raycontrolnet.errors import in_one_line
from raycontrolnet.model.components import Components, load_components, working_precision
from raycontrolnet.run import validation
from raycontrolnet.run.job import Job, check_folder_is_shared, logging_to_run_log

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import ControlNetModel

logger = logging.getLogger(__name__)


class Drawn(NamedTuple):
    """The validation images of one set of weights."""

    step: int
    pairs: list[validation.PairResult]
    seconds: float = 0.0
    """Beside the training."""


class Painter:
    """The actor."""

    def __init__(self, job: Job):
        self.job = job
        self.device = torch.device("cuda" if job.use_gpu else "cpu")
        self.components: Components | None = None
        if job.threads is not None:
            torch.set_num_threads(job.threads)

    def ready(self) -> None:
        """Answers once the actor has its place."""

    def draw(self, step: int, weights: Mapping[str, torch.Tensor]) -> Drawn:
        """Draw and save the validation images of `step`, with the ControlNet's `weights`."""
        start, job, config = time.perf_counter(), self.job, self.job.config
        precision = working_precision(config.mixed_precision)
        with logging_to_run_log(job, "validation"):
            if self.components is None:
                check_folder_is_shared(job)
                self.components = load_components(config, device=self.device, dtype=precision, seed=0, token=job.token)
                self.components.controlnet.requires_grad_(False).eval()
            self.components.controlnet.load_state_dict(weights)
            options: dict[str, Any] = {"resolution": config.resolution}
            validation.write(
                job.output_dir,
                step,
                job.validation_items,
                self.components,
                device=self.device,
                autocast=None if precision == torch.float32 else precision,
                **options,
            )
            pairs = validation.finish(job.output_dir, step, job.validation_items, **options)
        return Drawn(step, pairs, time.perf_counter() - start)


def start_painter(job: Job, resources: WorkerResources) -> Any:
    """The actor's handle, on a spare worker's resources; on the driver, before the workers start."""
    options: dict[str, Any] = {"num_cpus": resources.cpus_per_worker, "max_restarts": 1}
    if resources.use_gpu:
        options |= {"num_gpus": 1, "accelerator_type": resources.accelerator_type}
    return ray.remote(Painter).options(**options).remote(job)


@contextmanager
def with_painter(job: Job, resources: WorkerResources) -> Iterator[Job]:
    """The job with an actor that draws beside it, for its time, if there are images to draw and room for it."""
    if not (job.validation_items and resources.spare):
        yield job
        return
    painter = start_painter(job, resources)
    try:
        yield dataclasses.replace(job, painter=painter)
    finally:
        ray.kill(painter)


class Beside:
    """The training's end, in the worker of rank 0."""

    def __init__(self, painter: Any):
        self._painter = painter
        self._pending: Any = None
        self._ready = painter.ready.remote()

    @property
    def free(self) -> bool:
        """Whether the actor waits for work; not while it waits for its place itself."""
        return self._painter is not None and self._pending is None and bool(ray.wait([self._ready], timeout=0)[0])

    def draw(self, step: int, controlnet: ControlNetModel) -> None:
        """Send the actor a copy of the weights as they are now."""
        weights = {name: value.detach().cpu() for name, value in controlnet.state_dict().items()}
        self._pending = self._painter.draw.remote(step, ray.put(weights))

    def collect(self, *, wait: bool = False) -> Drawn | None:
        """What the actor has finished, if anything; it is free then."""
        if self._pending is None or not (wait or ray.wait([self._pending], timeout=0)[0]):
            return None
        pending, self._pending = self._pending, None
        try:
            return ray.get(pending)
        except ray.exceptions.RayError as error:
            logger.warning("validation beside the training failed (%s); the workers do it now", in_one_line(error))
            self._painter = None
            return None
