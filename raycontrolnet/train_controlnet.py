"""The worker loop, which each Ray Train worker runs.

From top to bottom: the stream of batches, the training state, then for every update: batches, steps, metrics, and when
due a checkpoint or validation images; at the end the final weights.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import ray
import ray.train
import torch

from raycontrolnet.cluster.versions import check_versions_here
from raycontrolnet.cluster.worker import ReclaimNotices, place_among_workers
from raycontrolnet.data.records import PreparedRow
from raycontrolnet.data.stream import local_batches, ray_batches
from raycontrolnet.data.threads import read_ahead
from raycontrolnet.errors import RunError, UserError
from raycontrolnet.model.batch import Batch, Draws
from raycontrolnet.model.graphs import graphs_used
from raycontrolnet.model.performance import fastest_convolutions, kernels_used, tf32, working_precision
from raycontrolnet.model.step import TrainState, train_step
from raycontrolnet.storage.checkpoint import Checkpoint
from raycontrolnet.text import counted
from raycontrolnet.training.diagnosis import NotFiniteUpdates
from raycontrolnet.training.failures import bad_samples_advised, failures_recorded, read_failure, retried_if_continued
from raycontrolnet.training.figures import OnItsWay, mean_over_workers
from raycontrolnet.training.final_weights import save_final_weights
from raycontrolnet.training.host_memory import freed_memory_kept
from raycontrolnet.training.job import Job
from raycontrolnet.training.memory import advice_for
from raycontrolnet.training.metrics import MetricsLog, PendingMetrics, PhaseClock, UpdateMetrics
from raycontrolnet.training.room import check_room
from raycontrolnet.training.run_log import log_of, logging_to_run_log
from raycontrolnet.training.run_marks import stop_asked
from raycontrolnet.training.saver import CheckpointSaver
from raycontrolnet.training.schedule import Schedule, Share
from raycontrolnet.training.shared_folder import check_folder_is_shared
from raycontrolnet.training.state import accelerator_for, build_state, controlnet_bytes
from raycontrolnet.training.step_inputs import step_inputs
from raycontrolnet.training.store_sync import worker_in_step
from raycontrolnet.training.timings import read_timings, write_timings
from raycontrolnet.training.trackers import Trackers, open_trackers
from raycontrolnet.training.validator import Validator
from raycontrolnet.training.watchdog import Watchdog, worker_watched

logger = logging.getLogger(__name__)

GPU_METRICS_INTERVAL_S = 1.0


def train_controlnet(loop_config: Mapping[str, Job]) -> dict[str, Any] | None:
    """Run the job on this worker; `loop_config` is {"job": Job}.

    Returns:
        Step, samples, loss and seconds by phase; None if the job failed and another try would fail again, or if the
        driver asked for the end.
    """
    job = loop_config["job"]
    check_folder_is_shared(job)
    if read_failure(job.output_dir):
        return None  # Ray restarted the workers after a failure that would come again, which the driver reports
    rank, world_size = (0, 1) if job.local else place_among_workers()
    who = f"worker {rank}"
    with (
        worker_in_step(job, rank, log_of(job, who)),
        logging_to_run_log(job, who),
        failures_recorded(job.output_dir, partial(advice_for, job, world_size)),
        bad_samples_advised(cached=job.cached),
    ):
        clock = PhaseClock(read_timings(job.output_dir).get("timings"))  # continued after a restart
        if not clock.seconds:
            clock.seconds["start"] = time.time() - job.submitted
        if not job.local:
            check_versions_here(job.facts["versions"])  # the node may have joined late
        checkpoint = job.current_checkpoint()
        schedule = Schedule.of(job.config, job.num_samples, job.config.most_workers, checkpoint)
        if rank == 0:
            logger.info("update %d on: %s", checkpoint.step if checkpoint else 0, counted(world_size, "worker"))
        batches = read_ahead(_batches(job, schedule, checkpoint))  # begins now, while the models are read
        with (
            worker_watched(job, rank) as watchdog,
            accelerator_for(job.config, use_gpu=job.use_gpu, world_size=world_size) as accelerator,
            tf32(allowed=job.config.allow_tf32),
            fastest_convolutions(accelerator.device, working_precision(job.config.mixed_precision)),
            freed_memory_kept(on_cpu=accelerator.device.type == "cpu") as keeps_memory,
        ):
            if job.threads is not None:
                torch.set_num_threads(job.threads)
            with clock("model"), retried_if_continued(continued=checkpoint is not job.start):
                how: dict[str, Any] = {"encodes": not job.cached, "interpolation": job.interpolation}
                how["models_read"] = watchdog.models_read
                state = build_state(job.config, schedule, accelerator, checkpoint, job.token, **how)
            watchdog.state_built()
            share = Share(rank, world_size, schedule.micro_batches)
            summary = Worker(job, schedule, share, state, clock, watchdog).run(batches, checkpoint)
            return summary and {**summary, "freed_memory_kept": keeps_memory}


class Worker:
    """One worker's part of a run: everything but the step itself."""

    def __init__(
        self, job: Job, schedule: Schedule, share: Share, state: TrainState, clock: PhaseClock, watch: Watchdog
    ):
        self.job, self.schedule, self.share, self.state, self.clock = job, schedule, share, state, clock
        self.first_step, self.on_cpu = state.step, state.accelerator.device.type == "cpu"
        self.pending = PendingMetrics(0.0 if self.on_cpu else GPU_METRICS_INTERVAL_S, schedule.samples_per_update)
        most = job.config.max_nan if job.config.on_nan == "skip" else 0
        self.not_finite = NotFiniteUpdates(state, most, job.output_dir if share.rank == 0 else None)
        self.last: UpdateMetrics | None = None
        self.notices = OnItsWay(torch.zeros(2))
        """Means over the workers, in the last update: driver asks for the end, a lost machine for a checkpoint."""
        self.reclaims, self.saved_step = ReclaimNotices(local=job.local), -1
        # On a CPU training would lose as much time as writing takes; a store takes the network's.
        self.saver = CheckpointSaver(job, clock, rank=share.rank, beside=job.folder.is_stored or not self.on_cpu)
        self.metrics_log: MetricsLog | None = None
        self.trackers: Trackers | None = None
        if share.rank == 0:
            check_room(job.folder, controlnet_bytes(state), schedule, state.step, job.config)
            self.metrics_log = MetricsLog(job.output_dir, state.step)
            self.trackers = open_trackers(job.config, job.facts["settings"], state.step, job.output_dir)
        self.watchdog, self.validator = watch, Validator(job, share, state, clock, self.trackers, watch)

    def run(self, batches: Iterator[list[PreparedRow]], start: Checkpoint | None) -> dict[str, Any] | None:
        """Train to the end; None if the driver asked for an earlier one, for which there is a checkpoint then."""
        state, schedule, config = self.state, self.schedule, self.job.config
        inputs = read_ahead(step_inputs(batches, state, self.share, config, state.samples))
        self.rest_from_training()
        try:
            with self.watchdog.watched_last():
                if not self.train(inputs, start):
                    return None
            self.finish()
        except KeyboardInterrupt:  # as by a second Ctrl-C: the first only begins the end
            self.saver.drop()
            raise
        finally:
            if state.graphs:
                state.graphs.release()  # what else may hold the state holds no more than before
            with ExitStack() as closing:  # each, also when one fails or is interrupted
                for part in (self.trackers, self.validator, self.metrics_log, self.saver):
                    if part:
                        closing.callback(part.close)
        return {
            "step": state.step,
            "total_updates": schedule.total_updates,
            "samples": state.samples,
            "loss": self.last.loss if self.last else None,
            "processes": self.share.world_size,
            "timings": self.clock.rounded(),
            **kernels_used(state.components),
            **graphs_used(state.graphs, config, on_gpu=not self.on_cpu, num_workers=state.accelerator.num_processes),
        }

    def train(self, inputs: Iterator[tuple[Batch, Draws]], start: Checkpoint | None) -> bool:
        """Do the updates; return False if the driver asked for an end before the last, with a checkpoint of it."""
        state, schedule, validator, asked_to_end = self.state, self.schedule, self.validator, 0.0
        validator.make_up(start, schedule.total_updates)
        self.watchdog.progress("", timed=False)  # the first update may take as long as without it
        self.pending.restart_clock()
        while state.step < schedule.total_updates and not (asked_to_end or validator.is_cut_off):
            before = self.notices
            self.update(inputs)
            self.saver.check()
            # On a GPU those of the update before, so that this one need not be waited for.
            asked_to_end, asked_to_save = (self.notices if self.on_cpu else before).read()
            if state.step > self.first_step + (not self.on_cpu):
                self.watchdog.started()
            if not asked_to_end:
                saves = schedule.is_due(self.job.config.checkpointing_steps, state.step) or asked_to_save > 0
                self.validate_and_save(schedule.is_due(self.job.config.validation_steps, state.step), saves)
        ends_early = asked_to_end > 0 or validator.is_cut_off
        if ends_early and state.step > self.first_step:
            self.checkpoint()
            self.await_checkpoint()
        return not ends_early

    def validate_and_save(self, validates: bool, saves: bool) -> None:
        """Do what is due after an update; a validation ends early with the run."""
        if validates:
            self.record(force=True)
            self.validator.measure()  # before the checkpoint, which is reported with the figures
        if saves:
            self.checkpoint()
        draws = validates and self.state.step < self.schedule.total_updates
        if draws and not self.validator.is_cut_off:
            self.validator.draw()
        if validates or saves:
            self.rest_from_training()
        if draws and self.job.callback and not self.validator.is_cut_off:
            self.await_checkpoint()  # which it may ask for
            self.job.callback.validated(self.state.step)
            self.pending.restart_clock()

    def update(self, inputs: Iterator[tuple[Batch, Draws]]) -> None:
        """Do one optimizer update."""
        state, schedule = self.state, self.schedule
        start, number = time.perf_counter(), state.step - self.first_step
        micro_steps, weight = self.share.micro_steps(number), self.share.weight(number)
        state.begin_update(micro_steps)
        self.watchdog.begin_update(state.step + 1, micro_steps)
        losses: list[torch.Tensor] = []
        for _ in range(micro_steps):
            with self.clock("data_wait" if number or losses else "first_batch"), self.watchdog.waiting_for_data():
                batch, draws = self.next_input(inputs)
            with self.clock("step"):
                metrics = train_step(state, batch, draws, weight)
                losses.append(metrics.loss)
                self.watchdog.micro_step_done()
        with self.clock("step"):
            # In one message: the workers end, or write a checkpoint, after the same update.
            seen = [float(stop_asked(self.job)), float(self.reclaims.ask_for_checkpoint())]
            loss, self.notices = mean_over_workers(losses, weight, seen, state.accelerator)
            assert metrics.grad_norm is not None
            rate = schedule.samples_per_update / (time.perf_counter() - start)
            self.pending.add(
                UpdateMetrics(state.step, loss, metrics.lr, metrics.grad_norm, state.samples, rate, time.time())
            )
            self.record()
        if self.job.callback:
            self.job.callback.updated()

    def next_input(self, inputs: Iterator[tuple[Batch, Draws]]) -> tuple[Batch, Draws]:
        """Return the next micro-step's batch and draws."""
        try:
            return next(inputs)
        except StopIteration:
            raise RunError(f"The data stream ended at update {self.state.step}, before the run did") from None
        except UserError:
            if self.share.world_size == 1 and self.state.step > self.first_step:
                self.checkpoint()  # a bad row must not cost the updates since the last checkpoint
            raise

    def record(self, *, force: bool = False) -> None:
        """Write the figures of finished updates, if it is time or `force`.

        Raises:
            RunError: as `NotFiniteUpdates.add`.
        """
        for update in self.pending.ready(force=force):
            if problem := update.problem:
                loader = self.job.loader if self.job.local else ray.get(self.job.loader)
                self.not_finite.add(update, problem, loader)
                continue
            self.last = update
            if self.metrics_log and self.trackers:
                self.metrics_log.append(update._asdict())
                scalars = ("loss", "lr", "grad_norm", "images_per_second")
                self.trackers.scalars(update.step, {name: getattr(update, name) for name in scalars})

    def checkpoint(self) -> None:
        """Begin to write a checkpoint of the current update, and report it once it is whole."""
        if self.saved_step == self.state.step:
            return
        self.saved_step = self.state.step
        # The one before may still be on its way to a store, which takes as long as the network does.
        self.watchdog.progress("a checkpoint", timed=not self.job.folder.is_stored)
        self.record(force=True)  # a diverged model is not worth a checkpoint
        figures = self.last._asdict() if self.last else {"step": self.state.step}
        if (measured := self.validator.last) and measured.step == self.state.step:
            figures = measured._asdict() | figures
        with self.clock("checkpoint"):
            self.saver.save(self.state, figures)

    def await_checkpoint(self) -> None:
        """Return once the last checkpoint is whole; the other workers go on, and wait for rank 0 elsewhere."""
        self.watchdog.progress("the last checkpoint", timed=not self.job.folder.is_stored)
        with self.clock("checkpoint"):
            self.saver.wait()

    def rest_from_training(self) -> None:
        """Leave out of the next update's time what came since the last; write the seconds by phase."""
        self.pending.restart_clock()
        if self.share.rank == 0:
            write_timings(self.job.output_dir, self.clock.rounded(), self.share.world_size)

    def finish(self) -> None:
        """Write the final weights to the root of output_dir, and validate them."""
        self.record(force=True)
        self.await_checkpoint()
        with self.clock("checkpoint"):
            if self.share.rank == 0:
                save_final_weights(self.state, self.job.config, self.job.folder)
                self.job.folder.prune(self.job.config.checkpoints_total_limit)  # if the run was killed before that
        self.validator.finish()


def _batches(job: Job, schedule: Schedule, checkpoint: Checkpoint | None) -> Iterator[list[PreparedRow]]:
    if not job.local:
        return ray_batches(ray.train.get_dataset_shard("train"))
    step, samples = (checkpoint.step, checkpoint.samples) if checkpoint else (0, 0)
    return local_batches(job.loader, samples, schedule.batches_per_worker(step))
