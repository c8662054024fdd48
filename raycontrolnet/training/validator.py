"""Validation in the worker: the held-out measure, and images, with as little of the training's time as possible.

Nothing here changes the training: neither its weights nor its randomness.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import ray
import torch

from raycontrolnet.cluster.worker import from_rank_zero, wait_for_all
from raycontrolnet.data.stream import BatchLoader
from raycontrolnet.model.averages import averaged
from raycontrolnet.model.performance import vae_on
from raycontrolnet.model.step import TrainState
from raycontrolnet.sampling import images, scores
from raycontrolnet.sampling.images import PairImages, fidelity_of
from raycontrolnet.storage.checkpoint import Checkpoint
from raycontrolnet.storage.files import replace_text
from raycontrolnet.training import held_out, validation
from raycontrolnet.training.final_weights import saved_controlnet
from raycontrolnet.training.job import Job
from raycontrolnet.training.metrics import MetricsLog, PhaseClock
from raycontrolnet.training.run_marks import stop_asked
from raycontrolnet.training.schedule import Share
from raycontrolnet.training.state import unwrap_controlnet
from raycontrolnet.training.store_sync import MODEL_CONFIG, WEIGHTS
from raycontrolnet.training.trackers import Trackers
from raycontrolnet.training.validation_actor import AsyncValidation, Drawn
from raycontrolnet.training.watchdog import Watchdog

if TYPE_CHECKING:
    from diffusers import ModelMixin

logger = logging.getLogger(__name__)


class Validator:
    """One worker's part of the validation. All workers call its methods together.

    Args:
        trackers: of the worker of rank 0; None elsewhere.
    """

    def __init__(
        self,
        job: Job,
        share: Share,
        state: TrainState,
        clock: PhaseClock,
        trackers: Trackers | None,
        watchdog: Watchdog,
    ):
        self.job, self.state, self.clock, self.watchdog = job, state, clock, watchdog
        self.rank, self.world_size = share.rank, share.world_size
        self.trackers = trackers
        self.last: held_out.HeldOutMetrics | None = None
        """The last measurement."""
        self.loader: BatchLoader | None = None
        self.is_cut_off = False
        """True if the driver asked for the end, on all workers: the run that goes on makes up for what was left out."""
        self.kept = held_out.KeptSamples()
        self.log: MetricsLog | None = None
        self.actor: AsyncValidation | None = None
        if job.num_held_out:
            self.loader = job.loader if job.local else ray.get(job.loader)
            self.log = MetricsLog(job.output_dir, state.step, held_out.HELD_OUT_FILE) if self.rank == 0 else None
        if job.actor_options is not None and self.rank == 0:
            self.actor = AsyncValidation(job)

    def measure(self) -> None:
        """Measure this worker's share of the held-out samples; rank 0 logs the result of all.

        The weights are those that a checkpoint now would offer: the averages, if there are any.
        """
        if self.loader is None:
            return
        try:
            with self.clock("validation"), self.state.paused(), self._averaged():
                self.last = held_out.measure(
                    self.state,
                    self.loader,
                    rank=self.rank,
                    world_size=self.world_size,
                    ends_early=lambda: self._ends_early("the held-out measure"),
                    kept=self.kept,
                )
        except held_out.MeasureStopped:
            self.is_cut_off = True
            return
        if self.last and self.log and self.trackers:
            self.log.append(self.last._asdict() | ({"weights": held_out.AVERAGES} if self.state.averages else {}))
            names = ("val_loss", "val_loss_shuffled", "control_gap")
            self.trackers.scalars(self.last.step, {name: getattr(self.last, name) for name in names})
            logger.info("step %d: %s", self.last.step, held_out.in_words(held_out.read(self.job.output_dir)))

    def draw(self) -> None:
        """Draw images of the weights that are measured: in the actor if it is free, else all workers draw."""
        if self.job.validation_items:
            with self.clock("validation_images"), self._averaged():
                if not self._sent_to_actor():
                    self._draw_together(lambda: unwrap_controlnet(self.state))

    def make_up(self, start: Checkpoint | None, total_updates: int) -> None:
        """Do what is left of the validation of the checkpoint `start`, if the run was ended or killed before.

        A measurement that was cut off is made up for; images are drawn once.
        """
        if start is None or not _was_validated(start, self.job, total_updates):
            return
        if self.loader and self._agreed(lambda: self._lacks_measurement(start.step)):
            self.measure()
        if self.is_cut_off or start.step == total_updates or not start.manifest["settings"].get("validation_image"):
            return
        if self._agreed(lambda: self._begins_to_make_up(start.step)):
            self.draw()
            # Else the actor draws them, or they failed.
            if self.rank == 0 and (self.is_cut_off or not self._lacks_images(start.step)):
                self._forget_attempt()

    def _agreed(self, ask: Callable[[], bool]) -> bool:
        """Return, on every worker, what rank 0 finds."""
        found = self.rank == 0 and ask()
        return from_rank_zero(found) if self.world_size > 1 else found

    def _lacks_measurement(self, step: int) -> bool:
        return all(record["step"] != step for record in held_out.read(self.job.output_dir))

    def _forget_attempt(self) -> None:
        with validation.failures_logged(self.state.step):
            self.job.folder.delete(validation.MADE_UP_FILE)

    def _begins_to_make_up(self, step: int) -> bool:
        """Check whether images of `step` are missing, and note the attempt; False if there has been one."""
        if not self._lacks_images(step):
            return False
        folder, mark = self.job.folder, validation.MADE_UP_FILE
        folder.pull(mark)
        file = folder.path / mark
        if file.exists() and file.read_text() == str(step):
            logger.warning("step %d: no validation images; an earlier attempt to draw them was cut short", step)
            return False
        replace_text(file, str(step), sync=True)
        folder.push(mark)
        return True

    def _lacks_images(self, step: int) -> bool:
        return self.job.folder.state_of(validation.metadata_of(step)) is None

    def finish(self) -> None:
        """Draw images of the final weights as they were saved, in the precision that others will read."""
        if self.job.validation_items:
            with self.clock("validation_images"):
                self._wait_for_all()  # until they are saved
                self._draw_together(self._saved_controlnet)
                if self.actor:
                    self._publish(self.actor.collect(lambda: self._ends_early("validation images")))
                if self.rank == 0:  # an attempt that failed, or whose images the actor drew
                    self._forget_attempt()

    def _wait_for_all(self) -> None:
        """Wait for the other workers by Ray's barrier: one of the process group has a timeout."""
        if self.world_size > 1:
            wait_for_all()

    def _averaged(self) -> AbstractContextManager[None]:
        return averaged(self.state.components.controlnet, self.state.averages)

    def close(self) -> None:
        if self.log:
            self.log.close()

    def _sent_to_actor(self) -> bool:
        """Send the weights to the actor if it is free; the same answer on every worker."""
        if self.job.actor_options is None:
            return False
        free = False
        if self.actor:
            self._publish(self.actor.collect())
            free = self.actor.free
        if self.world_size > 1:
            free = from_rank_zero(free)
        if free and self.actor:
            with validation.failures_logged(self.state.step):
                self.actor.draw(self.state.step, unwrap_controlnet(self.state))
        return free

    def _draw_together(self, controlnet: Callable[[], ModelMixin]) -> None:
        """Draw this worker's share; rank 0 finishes and publishes the images of all."""
        state, folder = self.state, self.job.folder
        drawing = self.job.images_of(state.step, state.components.family)
        files, whole = validation.files_of(state.step), True
        if folder.is_stored:
            self._forget(files)
        with (
            validation.failures_logged(state.step),
            state.paused(),
            vae_on(state.components, state.accelerator.device),
        ):
            components = replace(state.components, controlnet=controlnet())
            whole = drawing.draw(components, self.rank, self.world_size, lambda: self._ends_early("validation images"))
            if self.world_size > 1:  # who may have no disk in common
                folder.push(files)
        self._wait_for_all()
        self.is_cut_off = not self._all(whole)
        if self.rank == 0 and not self.is_cut_off:
            pairs: list[PairImages] = []
            with validation.failures_logged(state.step):
                if self.world_size > 1:
                    folder.pull(files)
                pairs = drawing.finish()
                validation.send(folder, state.step)
            self._publish(Drawn(state.step, pairs))

    def _saved_controlnet(self) -> ModelMixin:
        if self.rank > 0:
            self.job.folder.pull(WEIGHTS, MODEL_CONFIG)
        return saved_controlnet(self.job.output_dir, self.state)

    def _forget(self, files: str) -> None:
        """Delete the images of an earlier part of the run, which would be taken for these."""
        if self.rank == 0:
            with validation.failures_logged(self.state.step):
                self.job.folder.delete(files)
        self._wait_for_all()

    def _ends_early(self, phase: str) -> bool:
        """Check, again and again, for the driver's wish to end, which waits for no validation."""
        self.watchdog.progress(phase)
        return stop_asked(self.job)

    def _all(self, own: bool) -> bool:
        """Return, on every worker, whether `own` is true on all; they must be together by then."""
        if self.world_size == 1:
            return own
        accelerator = self.state.accelerator
        others = torch.tensor(float(not own), device=accelerator.device)
        return float(accelerator.reduce(others, reduction="sum")) == 0

    def _publish(self, drawn: Drawn | None) -> None:
        """Give the trackers what was drawn."""
        if drawn is None or self.trackers is None:
            return
        if drawn.seconds:
            self.clock.seconds["validation_beside"] += drawn.seconds
        pairs = drawn.pairs
        if pairs and drawn.seconds and self.job.folder.is_stored:  # by the actor, perhaps on another machine
            pairs = []
            with validation.failures_logged(drawn.step):
                self.job.folder.pull(validation.files_of(drawn.step))
                pairs = images.results(validation.step_folder(self.job.output_dir, drawn.step))
        for pair in pairs:
            key = f"{validation.VALIDATION_FOLDER}/{pair.name}"  # not the prompt: equal ones would collide
            self.trackers.images(drawn.step, key, [pair.control, *pair.images], pair.prompt)
        if fidelity := fidelity_of(pairs):
            self.trackers.scalars(drawn.step, {"control_fidelity": fidelity.mean})
            logger.info("step %d: %s", drawn.step, scores.in_words(fidelity))


def _was_validated(start: Checkpoint, job: Job, total_updates: int) -> bool:
    """Check that a validation was due at a checkpoint of this run's folder, and still is."""
    settings, steps = start.manifest.get("settings", {}), job.config.validation_steps
    if start.uri or start.path.parent != job.output_dir or (start.step % steps and start.step != total_updates):
        return False
    return bool(settings.get("validation_steps") == steps)
