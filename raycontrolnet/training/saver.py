"""The run's checkpoints, written beside the training: rank 0's part of it.

    state -> copy in host memory (between two updates) -> files, checksums, manifest, store, pruning (in a thread)

At most one is being written. It counts once its manifest is there, as every checkpoint: a kill before that loses it
alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch

from raycontrolnet.cluster.worker import report_checkpoint
from raycontrolnet.model.step import TrainState
from raycontrolnet.storage.checkpoint import name_of
from raycontrolnet.text import file_size
from raycontrolnet.training.failures import failures_recorded
from raycontrolnet.training.job import Job
from raycontrolnet.training.metrics import PhaseClock
from raycontrolnet.training.state import StateParts, state_parts, write_parts
from raycontrolnet.training.store_sync import RECORDS

logger = logging.getLogger(__name__)

SPARE = 1.25
"""Host memory that must be available, as a multiple of the copy."""


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
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copy = HostCopy()
        self._writing: Future[None] | None = None

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
            parts = self._copy.of(parts)
        written = self._writing = self._pool.submit(self._write, state, parts, state.step, state.samples, beside=beside)
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
        writing, self._writing = self._writing, None
        if writing:
            try:
                writing.result()
            except KeyboardInterrupt:
                self._writing = writing  # for `close`
                raise

    def close(self) -> None:
        """Wait for the last checkpoint, also of a run that has failed."""
        try:
            self.wait()
        except Exception:
            logger.exception("the last checkpoint was not written")
        self._pool.shutdown()

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
            )
            job.folder.prune(job.config.checkpoints_total_limit)

    def _has_room(self, parts: StateParts) -> bool:
        """Check whether a copy fits into the host's memory; if not, write between the updates from now on."""
        import psutil

        needed = SPARE * self._copy.bytes_to_come(parts)
        available = psutil.virtual_memory().available
        if needed > available:
            self._beside = False
            logger.warning(
                "checkpoints are written between updates, not beside them: that needs %s of host memory, and %s are "
                "available",
                file_size(needed),
                file_size(available),
            )
        return self._beside


class HostCopy:
    """A copy of nested tensors in host memory, which the next copy uses again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[object, ...], torch.Tensor] = {}

    def of(self, parts: StateParts) -> StateParts:
        """Return `parts` with their tensors copied, as they are now."""
        copied = StateParts(*(self._copied(part, (place,)) for place, part in enumerate(parts)))
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.current_stream().synchronize()
        return copied

    def bytes_to_come(self, parts: StateParts) -> int:
        """Return the bytes that a copy would take besides what it has."""
        if self._buffers:
            return 0
        return sum(value.numel() * value.element_size() for value in _tensors(parts))

    def _copied(self, value: Any, place: tuple[object, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._buffer(value, place).copy_(value.detach(), non_blocking=True)
        if isinstance(value, Mapping):
            return {key: self._copied(each, (*place, key)) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copied(each, (*place, number)) for number, each in enumerate(value))
        return value

    def _buffer(self, like: torch.Tensor, place: tuple[object, ...]) -> torch.Tensor:
        """Return the buffer of a tensor; pinned for one on a GPU, from which it is then copied at full speed."""
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[place] = buffer
        return buffer


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, (list, tuple)) else []
