"""Validation images beside the training: drawn by an actor where the cluster has room for one worker more.

The actor reads the base model once, and then draws with each ControlNet that it is sent: training waits for nothing but
the copy of the weights. While the actor is busy, the workers share the drawing, as they do without it. If it is lost,
so are the images that it was at, and the workers do the rest.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import torch

from raycontrolnet.model.components import Components, load_components
from raycontrolnet.model.performance import enable_memory_savers, working_precision
from raycontrolnet.sampling.pipeline import Sampling
from raycontrolnet.text import one_line
from raycontrolnet.training import validation
from raycontrolnet.training.job import Job, check_folder_is_shared, logging_to_run_log

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import ControlNetModel

logger = logging.getLogger(__name__)

FIRST_PATIENCE_S = 15.0
PLACE_WITHIN_S = 120.0
FINISH_WITHIN_S = 1800.0
"""How long a run's end waits for the images that are being drawn."""


class Drawn(NamedTuple):
    """The validation images of one set of weights."""

    step: int
    pairs: list[validation.PairResult]
    seconds: float = 0.0
    """Beside the training."""


class ValidationActor:
    """The actor."""

    def __init__(self, job: Job):
        self.job = job
        self.device = torch.device("cuda" if job.use_gpu else "cpu")
        self.components: Components | None = None
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        torch.backends.cuda.matmul.allow_tf32 = job.config.allow_tf32

    def ready(self) -> None:
        """Answers once the actor has its place."""

    def draw(self, step: int, weights: Mapping[str, torch.Tensor], token: str | None) -> Drawn:
        """Draw and save the validation images of `step`, with the ControlNet's `weights`.

        Args:
            token: for a private base model; not for the constructor, whose arguments Ray keeps.
        """
        start, job, config = time.perf_counter(), self.job, self.job.config
        precision = working_precision(config.mixed_precision)
        with logging_to_run_log(job, "validation"):
            if self.components is None:
                check_folder_is_shared(job)
                self.components = load_components(config, device=self.device, dtype=precision, seed=0, token=token)
                self.components.controlnet.requires_grad_(False).eval()
                if config.enable_xformers_memory_efficient_attention:
                    enable_memory_savers(self.components, gradient_checkpointing=False, xformers=True)
            self.components.controlnet.load_state_dict(weights)
            sampling = Sampling(guidance_scale=config.guidance_scale)
            options: dict[str, Any] = {"resolution": config.resolution, "sampling": sampling}
            validation.write(
                job.output_dir,
                step,
                job.validation_items,
                self.components,
                device=self.device,
                autocast=None if precision == torch.float32 else precision,
                **options,
            )
            measure = config.control_fidelity
            pairs = validation.finish(job.output_dir, step, job.validation_items, measure=measure, **options)
        return Drawn(step, pairs, time.perf_counter() - start)


class AsyncValidation:
    """The training's end, in the worker of rank 0, which owns the actor: the two end together.

    The actor comes after the workers have their places, so that it never takes one of theirs, also after a restart.
    """

    def __init__(self, job: Job):
        self._token = job.token
        self._pending: Any = None
        self._painter: Any = None
        self._patience_s = FIRST_PATIENCE_S
        if job.spare is not None and _is_there(job.spare):
            # Outside the workers' placement group, which has no room for it.
            options: dict[str, Any] = {**job.spare, "scheduling_strategy": "DEFAULT"}
            self._painter = ray.remote(ValidationActor).options(**options).remote(replace(job, token=None, loader=None))
            self._ready = self._painter.ready.remote()
            self._asked_at = time.monotonic()

    @property
    def free(self) -> bool:
        """Whether the actor waits for work. One that finds no place in time is given up: others may need it."""
        if self._painter is None or self._pending is not None:
            return False
        # The first images of a short run may be due before the actor's process is up.
        patience_s, self._patience_s = self._patience_s, 0.0
        if ray.wait([self._ready], timeout=patience_s)[0]:
            return True
        if time.monotonic() - self._asked_at > PLACE_WITHIN_S:
            self._give_up("it found no place")
        return False

    def draw(self, step: int, controlnet: ControlNetModel) -> None:
        """Send the actor a copy of the weights as they are now."""
        weights = {name: value.detach().cpu() for name, value in controlnet.state_dict().items()}
        self._pending = self._painter.draw.remote(step, ray.put(weights), self._token)

    def collect(self, *, wait: bool = False) -> Drawn | None:
        """What the actor has finished, if anything; it is free then."""
        if self._pending is None or not ray.wait([self._pending], timeout=FINISH_WITHIN_S if wait else 0)[0]:
            return None
        pending, self._pending = self._pending, None
        try:
            return ray.get(pending)
        except ray.exceptions.RayError as error:
            self._give_up(one_line(error))
            return None

    def _give_up(self, reason: str) -> None:
        logger.warning("validation beside the training failed (%s); the workers do it now", reason)
        ray.kill(self._painter)
        self._painter = None


def _is_there(resources: Mapping[str, Any]) -> bool:
    """Whether the cluster has now what an actor needs: a waiting one would make an autoscaler start a machine."""
    available = ray.available_resources()
    wanted = {"CPU": resources["num_cpus"], "GPU": resources.get("num_gpus", 0)}
    return all(available.get(name, 0.0) >= amount for name, amount in wanted.items())
