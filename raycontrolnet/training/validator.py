"""Validation in the worker: the held-out measure, and images, with as little of the training's time as can be.

Nothing here changes the training: not its weights, nor its randomness.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch

from raycontrolnet.cluster.worker import from_rank_zero, wait_for_all
from raycontrolnet.data.stream import BatchLoader
from raycontrolnet.model.components import with_controlnet
from raycontrolnet.model.performance import vae_on, working_precision
from raycontrolnet.model.step import TrainState
from raycontrolnet.sampling import scores
from raycontrolnet.sampling.images import fidelity_of
from raycontrolnet.sampling.pipeline import Sampling
from raycontrolnet.training import held_out, validation
from raycontrolnet.training.job import Job
from raycontrolnet.training.metrics import MetricsLog, PhaseClock
from raycontrolnet.training.schedule import Schedule
from raycontrolnet.training.state import saved_controlnet, unwrap_controlnet
from raycontrolnet.training.trackers import Trackers
from raycontrolnet.training.validation_actor import AsyncValidation, Drawn

if TYPE_CHECKING:
    from diffusers import ControlNetModel

logger = logging.getLogger(__name__)


class Validator:
    """One worker's part of the validation. All workers call its methods together.

    Args:
        trackers: of the worker of rank 0; None elsewhere.
    """

    def __init__(
        self, job: Job, plan: Schedule, state: TrainState, rank: int, clock: PhaseClock, trackers: Trackers | None
    ):
        self.job, self.plan, self.state, self.rank, self.clock = job, plan, state, rank, clock
        self.trackers = trackers
        self.last: held_out.HeldOutMetrics | None = None
        """The last measurement."""
        self.loader: BatchLoader | None = None
        self.log: MetricsLog | None = None
        self.beside: AsyncValidation | None = None
        if job.num_held_out:
            self.loader = job.loader if job.local else ray.get(job.loader)
            self.log = MetricsLog(job.output_dir, state.step, held_out.HELD_OUT_FILE) if rank == 0 else None
        if job.spare is not None and rank == 0:
            self.beside = AsyncValidation(job)

    def measure(self) -> None:
        """Measure the held-out samples, every worker its share."""
        if self.loader is None:
            return
        with self.clock("validation"):
            self.last = held_out.measure(
                self.state,
                self.loader,
                resolution=self.job.config.resolution,
                rank=self.rank,
                world_size=self.plan.world_size,
            )
        if self.last and self.log and self.trackers:
            self.log.append(self.last._asdict())
            names = ("val_loss", "val_loss_shuffled", "control_gap")
            self.trackers.scalars(self.last.step, {name: getattr(self.last, name) for name in names})
            logger.info("step %d: %s", self.last.step, held_out.in_words(held_out.read(self.job.output_dir)))

    def draw(self) -> None:
        """Images of the weights as they are: beside the training if there is room, else by all workers."""
        if self.job.validation_items:
            with self.clock("validation_images"):
                if not self._draw_beside():
                    self._draw_together(lambda: unwrap_controlnet(self.state))

    def finish(self) -> None:
        """Images of the final weights as they were saved."""
        if self.job.validation_items:
            with self.clock("validation_images"):
                _barrier()  # until they are saved
                self._draw_together(lambda: saved_controlnet(self.job.output_dir, self.state))
                if self.beside:
                    self._publish(self.beside.collect(wait=True))

    def close(self) -> None:
        if self.log:
            self.log.close()

    def _draw_beside(self) -> bool:
        """Send the weights to the spare worker, if there is one and it is free; the same answer on every worker."""
        if self.job.spare is None:
            return False
        free = False
        if self.beside:
            self._publish(self.beside.collect())
            free = self.beside.free
        if self.plan.world_size > 1:
            free = from_rank_zero(free)
        if free and self.beside:
            with _no_picture_is_worth_a_run(self.state.step):
                self.beside.draw(self.state.step, unwrap_controlnet(self.state))
        return free

    def _draw_together(self, controlnet: Callable[[], ControlNetModel]) -> None:
        """Every worker draws its share."""
        job, state = self.job, self.state
        precision = working_precision(job.config.mixed_precision)
        options: dict[str, Any] = {
            "resolution": job.config.resolution,
            "sampling": Sampling(guidance_scale=job.config.guidance_scale),
        }
        with _no_picture_is_worth_a_run(state.step), vae_on(state.components, state.accelerator.device):
            validation.write(
                job.output_dir,
                state.step,
                job.validation_items,
                with_controlnet(state.components, controlnet()),
                device=state.accelerator.device,
                autocast=None if precision == torch.float32 else precision,
                shard=(self.rank, self.plan.world_size),
                **options,
            )
        _barrier()  # Ray's, not the process group's: a slow worker cannot time a collective out
        if self.rank == 0:
            items, measure = job.validation_items, job.config.control_fidelity
            pairs = validation.finish(job.output_dir, state.step, items, measure=measure, **options)
            self._publish(Drawn(state.step, pairs))

    def _publish(self, drawn: Drawn | None) -> None:
        """Give the trackers what was drawn."""
        if drawn is None or self.trackers is None:
            return
        if drawn.seconds:
            self.clock.seconds["validation_beside"] += drawn.seconds
        for pair in drawn.pairs:
            self.trackers.images(drawn.step, pair.key, [pair.control, *pair.images], pair.prompt)
        if fidelity := fidelity_of(drawn.pairs):
            self.trackers.scalars(drawn.step, {"control_fidelity": fidelity.mean})
            logger.info("step %d: %s", drawn.step, scores.in_words(fidelity))


@contextmanager
def _no_picture_is_worth_a_run(step: int) -> Iterator[None]:
    """What goes wrong, such as memory that is full, is logged: other workers wait for this one, not for pictures."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever it was)
        validation.log_failure(step, error)


def _barrier() -> None:
    if ray.train.get_context().get_world_size() > 1:
        wait_for_all()
