"""The run's checkpoints, written beside the training: rank 0's part of it.

    state -> copy in host memory (between two updates) -> files, checksums, manifest, store, pruning (in a thread)

At most one is being written. It counts once its manifest is there, as every checkpoint: a kill before that loses it
alone. Where Ray is to end this process, as others of the run have failed, it is asked first with `writes_finished`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, wait
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

from raycontrolnet.cluster.machine_memory import available_bytes
from raycontrolnet.cluster.worker import report_checkpoint
from raycontrolnet.model.step import TrainState
from raycontrolnet.signals import leave_threads
from raycontrolnet.storage.checkpoint import name_of
from raycontrolnet.text import file_size
from raycontrolnet.training.background import begun
from raycontrolnet.training.failures import failures_recorded
from raycontrolnet.training.host_copy import HostCopy
from raycontrolnet.training.job import Job
from raycontrolnet.training.metrics import PhaseClock
from raycontrolnet.training.run_log import log_of
from raycontrolnet.training.state import StateParts, state_parts, write_parts
from raycontrolnet.training.store_sync import RECORDS

logger = logging.getLogger(__name__)

SPARE = 1.25
"""Host memory that must be available, as a multiple of the copy."""

_unfinished: set[Future[None]] = set()
"""Checkpoints that this process is writing."""


class DroppedError(Exception):
    """Nobody waits for the checkpoint any more: it is not to be completed."""


def writes_finished(patience_s: float) -> bool:
    """Wait until this process writes no checkpoint, for `patience_s` at most; return True if that is so."""
    return not wait(tuple(_unfinished), patience_s).not_done


class CheckpointSaver:
    """Writer of a run's checkpoints, one at a time. All workers call `save`; rank 0 writes."""

    def __init__(self, job: Job, clock: PhaseClock, *, rank: int, beside: bool):
        """Begin without a copy; the first checkpoint makes room for it.

        Args:
            job: the run's.
            clock: gets the seconds of writing as `checkpoint_beside`.
            rank: this worker's.
            beside: whether training goes on meanwhile, which takes as much host memory as a checkpoint has bytes.
        """
        self._job, self._clock, self._rank, self._beside = job, clock, rank, beside
        self._copy = HostCopy()
        self._writing: Future[None] | None = None
        self._is_dropped = False
        if beside and rank == 0:
            clock.seconds["checkpoint_beside"] += 0.0  # here: the thread must add no phase while others are read

    def save(self, state: TrainState, figures: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint of `state`, once the one before is written; report it once it is whole.

        Args:
            state: may go on training as soon as this returns.
            figures: reported with it.

        Raises:
            OSError: this one, or the one before, could not be written.
        """
        folder, name = self._job.folder, name_of(state.step)
        written = self._write_soon(state) if self._rank == 0 else None
        if self._job.local:
            return
        if written is None:
            report_checkpoint(figures, name, None)
        else:
            report_checkpoint(figures, name, folder.place_in(name), written.result)

    def _write_soon(self, state: TrainState) -> Future[None]:
        self.wait()
        parts = state_parts(state)
        beside = self._beside and self._has_room(parts)
        if beside:
            try:
                parts = self._copy.of(parts)
            except (RuntimeError, MemoryError):  # as where pinned memory is limited
                logger.warning("checkpoints are written between updates: no copy can be made", exc_info=True)
                self._copy, beside = HostCopy(), False
                self._beside = False
        write = partial(self._write_or_tell, state, parts, state.step, state.samples, beside=beside)
        written = self._writing = begun(write, "checkpoint", _unfinished)
        if not beside:
            self.wait()
        return written

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written, if it is known by now."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return once no checkpoint is being written.

        Raises:
            OSError: it could not be written.
        """
        try:
            if self._writing:
                self._writing.result()
        except KeyboardInterrupt:
            self.drop()
            raise
        finally:
            self._writing = None

    def drop(self) -> None:
        """Give the checkpoint up that is being written: it is not completed, and nobody waits for it."""
        self._is_dropped = True
        writing, self._writing = self._writing, None
        if writing and not writing.done():
            _unfinished.discard(writing)
            leave_threads()

    def close(self) -> None:
        """Wait for the last checkpoint, also of a run that has failed, unless it is dropped."""
        with suppress(Exception):  # which is in the log
            self.wait()

    def _write_or_tell(self, state: TrainState, parts: StateParts, step: int, samples: int, *, beside: bool) -> None:
        """Write; log a failure before anybody hears of it: the run may be ended then, and this process with it."""
        try:
            self._write(state, parts, step, samples, beside=beside)
        except Exception:
            if not self._is_dropped:
                logger.exception("%s was not written", name_of(step))
                with suppress(OSError):
                    self._job.folder.push(log_of(self._job, f"worker {self._rank}"), tries=2)
            raise

    def _write(self, state: TrainState, parts: StateParts, step: int, samples: int, *, beside: bool) -> None:
        job, seed = self._job, self._job.config.seed
        assert seed is not None
        with failures_recorded(job.output_dir), self._clock("checkpoint_beside") if beside else nullcontext():
            job.folder.push(*RECORDS)  # of the updates that a run which goes on from here will not do again
            job.folder.write_checkpoint(
                step=step,
                samples=samples,
                seed=seed,
                run_id=job.run_id,
                save=lambda folder: write_parts(state.components.controlnet, parts, folder),
                facts=job.facts,
                check=self._check_wanted,
            )
            self._check_wanted()
            job.folder.prune(job.config.checkpoints_total_limit)

    def _check_wanted(self) -> None:
        if self._is_dropped:
            raise DroppedError

    def _has_room(self, parts: StateParts) -> bool:
        """Check whether a copy fits into the host's memory; if not, write between the updates from now on."""
        needed, available = SPARE * self._copy.bytes_to_come(parts), available_bytes()
        if needed > available:
            self._beside = False
            logger.warning(
                "checkpoints are written between updates, not beside them: that needs %s of host memory, and %s are "
                "available",
                file_size(needed),
                file_size(available),
            )
        return self._beside
