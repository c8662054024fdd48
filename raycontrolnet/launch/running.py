"""A run while its workers train: its progress shown, its end begun by a signal, and explained if it comes early."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TextIO

from raycontrolnet.errors import always_explained, tell_meanwhile
from raycontrolnet.launch.checked_run import CheckedRun
from raycontrolnet.report.progress import Progress, progress
from raycontrolnet.signals import ended_in_order
from raycontrolnet.training import metrics
from raycontrolnet.training.failures import read_failure, read_hang
from raycontrolnet.training.job import Job
from raycontrolnet.training.run_callback import RunCallback
from raycontrolnet.training.run_log import RUN_LOG
from raycontrolnet.training.run_marks import ask_to_stop, mark_folder, remove_marks
from raycontrolnet.training.status import RunStatus
from raycontrolnet.training.store_sync import DRIVERS

LOOK_S = 15.0
"""Time after SIGTERM until a look whether the run still ends: Slurm and Kubernetes kill a process after 30 s."""


class _OrderlyEnd:
    """The end of a run that a signal asks for, and what is said of it on `stream`."""

    def __init__(self, run: CheckedRun, status: RunStatus, stream: TextIO, answers: Callable[[], bool]):
        self._run, self._status, self._stream, self._answers = run, status, stream, answers
        self._begun, self._is_late = time.time(), False

    def begin(self) -> bool:
        """Ask the workers for it; return False if none trains yet."""
        try:
            if (self._run.output_dir / metrics.METRICS_FILE).stat().st_mtime < self._begun:
                return False
            ask_to_stop(self._run.folder)
        except OSError:
            return False
        tell_meanwhile(self._stream, "ending with a checkpoint of the current update; Ctrl-C again to end at once")
        return True

    def goes_on(self) -> bool:
        """Check whether it can still come, some time after SIGTERM; whoever sent that may end this process by now."""
        if not self._answers():
            return False
        if not self._is_late:
            self._is_late = True
            with suppress(OSError):
                self._status.interrupted()
            tell_meanwhile(self._stream, "still ending; if it is killed now, --resume_from_checkpoint latest goes on")
        return True

    def last_words(self) -> None:
        """Put down that the run was interrupted, and say how to go on, before its process is ended."""
        with suppress(OSError):
            self._status.interrupted()
        stored = self._run.folder.is_stored  # which may not answer: nothing is asked of it
        how_to_go_on = "Go on with --resume_from_checkpoint latest." if stored else self._run.how_to_go_on()
        tell_meanwhile(self._stream, f"Interrupted. {how_to_go_on}")


@contextmanager
def running(
    run: CheckedRun,
    job: Job,
    status: RunStatus,
    stream: TextIO,
    callback: RunCallback | None,
    answers: Callable[[], bool],
) -> Iterator[None]:
    """Begin the run, and show its progress unless there is a callback.

    An early end is explained by the failure that a worker recorded, or else by Ray's error.

    Args:
        answers: looks whether the workers are still there, some time after SIGTERM.
    """
    total_updates, step = run.schedule(run.start).total_updates, run.start.step if run.start else 0
    config = run.config
    validates = config.num_held_out(len(run.source)) or config.validation_pairs
    shown = (
        nullcontext()
        if callback
        else progress(
            Progress(
                run.output_dir,
                total_updates,
                step,
                stream,
                scored=config.control_fidelity is not None,
                validation_steps=config.validation_steps if validates else None,
                num_images=len(job.validation_items),
            )
        )
    )
    mark_folder(run.folder, job)
    run.folder.push(*DRIVERS)
    orderly = _OrderlyEnd(run, status, stream, answers)
    with always_explained("The run", run.how_to_go_on, run.output_dir / RUN_LOG):
        try:
            ends = ended_in_order(orderly.begin, orderly.last_words, look_s=LOOK_S, still_ends=orderly.goes_on)
            with ends, shown:
                yield
        except Exception as error:
            if failure := read_failure(run.output_dir) or read_hang(run.output_dir):
                raise failure from error
            raise
        finally:
            remove_marks(run.folder)
