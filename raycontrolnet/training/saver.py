"""The run's checkpoints, written beside the training: rank 0's part of it.

    state -> copy in host memory (between two updates) -> files, checksums, manifest, store, pruning (in a thread)

At most one is being written. It counts once its manifest is there, as every checkpoint: a kill before that loses it
alone. Where Ray is to end this process, as others of the run have failed, it is asked first with `writes_finished`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch

from raycontrolnet.cluster.machine_memory import available_bytes
from raycontrolnet.cluster.worker import report_checkpoint
from raycontrolnet.model.step import TrainState
from raycontrolnet.signals import leave_threads
from raycontrolnet.storage.checkpoint import name_of
from raycontrolnet.text import file_size
from raycontrolnet.training.background import begun
from raycontrolnet.training.failures import failures_recorded
from raycontrolnet.training.job import Job
from raycontrolnet.training.metrics import PhaseClock
from raycontrolnet.training.run_log import log_of
from raycontrolnet.training.state import StateParts, state_parts, write_parts
from raycontrolnet.training.store_sync import RECORDS

logger = logging.getLogger(__name__)

TensorPath = tuple[object, ...]
"""Keys and numbers that lead to a tensor in nested ones."""
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


class HostCopy:
    """A copy of nested tensors in host memory, which the next copy uses again."""

    def __init__(self) -> None:
        self._buffers: dict[TensorPath, torch.Tensor] = {}

    def of(self, parts: StateParts) -> StateParts:
        """Return `parts` with their tensors copied, as they are now."""
        copied = StateParts(*_map_tensors(tuple(parts), self._copied))
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.current_stream().synchronize()
        return copied

    def bytes_to_come(self, parts: StateParts) -> int:
        """Return the bytes that a copy would take besides what it has."""
        sizes: list[int] = []

        def add(path: TensorPath, value: torch.Tensor) -> None:
            if not self._fits(path, value):
                sizes.append(_bytes_in_host(value))

        _map_tensors(tuple(parts), add)
        return sum(sizes)

    def _copied(self, path: TensorPath, value: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to its buffer; pinned for one on a GPU, from which it is then copied at full speed."""
        if not self._fits(path, value):
            self._buffers[path] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
        return self._buffers[path].copy_(value.detach(), non_blocking=True)

    def _fits(self, path: TensorPath, value: torch.Tensor) -> bool:
        buffer = self._buffers.get(path)
        return buffer is not None and buffer.shape == value.shape and buffer.dtype == value.dtype


def _map_tensors(value: Any, replace: Callable[[TensorPath, torch.Tensor], Any], path: TensorPath = ()) -> Any:
    """Return nested mappings, lists and tuples with each tensor replaced by what `replace` returns for it.

    Not torch's pytree, which takes a mapping of a class that it does not know, as of an optimizer, for a leaf.
    """
    if isinstance(value, torch.Tensor):
        return replace(path, value)
    if isinstance(value, Mapping):
        return {key: _map_tensors(each, replace, (*path, key)) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_tensors(each, replace, (*path, n)) for n, each in enumerate(value))
    return value


def _bytes_in_host(value: torch.Tensor) -> int:
    """Return the bytes of a tensor's copy; PyTorch rounds pinned memory up to powers of two."""
    size = value.numel() * value.element_size()
    return 1 << (size - 1).bit_length() if value.is_cuda and size else size
