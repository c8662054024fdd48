"""Validation images beside the training: drawn by an actor where the cluster has room for one worker more.

The actor loads the base model once and draws with each ControlNet that it is sent; training waits only for the copy of
the weights. While the actor is busy, or if there is none, the workers share the drawing. If the actor is lost, its
current images are lost too, and the workers draw the later ones.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import torch

from raycontrolnet.model.components import Components, load_components
from raycontrolnet.model.performance import allow_tf32, enable_memory_savers, working_precision
from raycontrolnet.sampling.images import PairImages
from raycontrolnet.text import one_line
from raycontrolnet.training import validation
from raycontrolnet.training.job import Job
from raycontrolnet.training.run_log import log_of, logging_to_run_log
from raycontrolnet.training.shared_folder import check_folder_is_shared

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diffusers import ModelMixin

logger = logging.getLogger(__name__)

FIRST_WAIT_S = 15.0
"""Wait for the actor's process when the first images are due; a short run may be there before it."""
START_WITHIN_S = 120.0
"""An actor that is not scheduled within this time is given up: others may need the resources."""
FINISH_WITHIN_S = 1800.0
"""Wait at the end of a run for images that are being drawn."""
LOOK_S = 0.5
"""Time between two looks whether the run ends early meanwhile."""


class Drawn(NamedTuple):
    """The validation images of one set of weights."""

    step: int
    pairs: list[PairImages]
    seconds: float = 0.0
    """Drawing time of the actor; 0 if the workers drew."""


class ValidationActor:
    """The actor that draws."""

    def __init__(self, job: Job):
        self.job = job
        self.device = torch.device("cuda" if job.use_gpu else "cpu")
        self.components: Components | None = None
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        allow_tf32(allowed=job.config.allow_tf32)

    def ready(self) -> None:
        """Return once the actor is scheduled."""

    def draw(self, step: int, weights: Mapping[str, torch.Tensor], token: str | None) -> Drawn:
        """Draw and save the validation images of `step`, with the ControlNet's `weights`.

        Args:
            token: for a private base model. Not an argument of the constructor, because Ray keeps those.
        """
        start = time.perf_counter()
        if self.components is None:
            check_folder_is_shared(self.job)
        with logging_to_run_log(self.job, "validation"):
            if self.components is None:
                self.components = self._load(token)
            self.components.controlnet.load_state_dict(weights)
            images = self.job.images_of(step, self.components.family)
            images.draw(self.components)
            pairs = images.finish()
            validation.send(self.job.folder, step)
            self.job.folder.push(log_of(self.job, "validation"))
        return Drawn(step, pairs, time.perf_counter() - start)

    def _load(self, token: str | None) -> Components:
        config = self.job.config
        precision = working_precision(config.mixed_precision)
        components = load_components(config, device=self.device, dtype=precision, seed=0, token=token, objective=config)
        components.controlnet.requires_grad_(False).eval()
        xformers = config.enable_xformers_memory_efficient_attention
        enable_memory_savers(components, gradient_checkpointing=False, xformers=xformers)
        return components


class AsyncValidation:
    """The handle of the actor in the worker of rank 0, which owns it: the two end together.

    The actor is created after the workers are placed, so that it never takes a worker's place, also after a restart.
    """

    def __init__(self, job: Job):
        self._token = job.token
        self._pending: Any = None
        self._actor: Any = None
        self._wait_s = FIRST_WAIT_S
        if job.actor_options is not None and _is_available(job.actor_options):
            # Outside the workers' placement group, which has no room for it.
            options: dict[str, Any] = {**job.actor_options, "scheduling_strategy": "DEFAULT"}
            self._actor = ray.remote(ValidationActor).options(**options).remote(replace(job, token=None, loader=None))
            self._ready = self._actor.ready.remote()
            self._asked_at = time.monotonic()

    @property
    def free(self) -> bool:
        """True if the actor is scheduled and idle."""
        if self._actor is None or self._pending is not None:
            return False
        wait_s, self._wait_s = self._wait_s, 0.0
        if ray.wait([self._ready], timeout=wait_s)[0]:
            return True
        if time.monotonic() - self._asked_at > START_WITHIN_S:
            self._give_up("it was not scheduled in time")
        return False

    def draw(self, step: int, controlnet: ModelMixin) -> None:
        """Send the actor a copy of the current weights."""
        weights = {name: value.detach().cpu() for name, value in controlnet.state_dict().items()}
        self._pending = self._actor.draw.remote(step, ray.put(weights), self._token)

    def collect(self, ends_early: Callable[[], bool] | None = None) -> Drawn | None:
        """Return the images that the actor has finished, if any; it is free then.

        Args:
            ends_early: asked while they are waited for; None not to wait.
        """
        if self._pending is None:
            return None
        until = time.monotonic() + FINISH_WITHIN_S
        while not ray.wait([self._pending], timeout=LOOK_S if ends_early else 0)[0]:
            if ends_early is None or time.monotonic() > until:
                return None
            if ends_early():
                logger.warning("the validation images that are drawn beside the training are left unfinished")
                return None
        pending, self._pending = self._pending, None
        try:
            return ray.get(pending)
        except ray.exceptions.RayError as error:
            self._give_up(one_line(error))
            return None

    def _give_up(self, reason: str) -> None:
        logger.warning("validation beside the training failed (%s); the workers do it now", reason)
        ray.kill(self._actor)
        self._actor = None


def _is_available(resources: Mapping[str, Any]) -> bool:
    """Check that the cluster has the resources now: a waiting actor would make an autoscaler start a machine."""
    available = ray.available_resources()
    wanted = {"CPU": resources["num_cpus"], "GPU": resources.get("num_gpus", 0)}
    return all(available.get(name, 0.0) >= amount for name, amount in wanted.items())
