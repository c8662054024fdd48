"""The files by which a driver marks a folder as its run's, and asks the workers to end."""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress

from raycontrolnet.cluster.worker import RECORDS_OF_RAY
from raycontrolnet.storage.files import replace_text
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training import held_out, metrics, validation
from raycontrolnet.training.failures import FAILURE_FILE, HANG_FILE
from raycontrolnet.training.job import Job
from raycontrolnet.training.timings import TIMINGS_FILE

logger = logging.getLogger(__name__)

RUN_ID_FILE = ".run_id"
"""File that says whose run the folder is."""
STOP_FILE = ".stop"
"""File by which the driver asks the workers to write a checkpoint and end."""
FOR_WORKERS = (FAILURE_FILE, HANG_FILE, RUN_ID_FILE, STOP_FILE)
"""Files that mean something only while a run goes on."""


def mark_folder(folder: RunFolder, job: Job) -> None:
    """Mark the folder as this run's; on the driver, before the workers start.

    Args:
        folder: as the driver uses it.
    """
    # Of an earlier run that left no checkpoint.
    if job.start is None:
        shutil.rmtree(folder.path / validation.VALIDATION_FOLDER, ignore_errors=True)
        folder.delete(f"{validation.VALIDATION_FOLDER}/*", validation.MADE_UP_FILE, metrics.LEFT_OUT_FILE)
    if job.start is None or job.start.manifest.get("held_out", 0) != job.num_held_out:
        folder.delete(held_out.HELD_OUT_FILE)
    # Ray must not find its records of an earlier run: only the checkpoints count.
    folder.delete(*FOR_WORKERS, *RECORDS_OF_RAY, TIMINGS_FILE)
    replace_text(folder.path / RUN_ID_FILE, job.run_id)
    folder.push(RUN_ID_FILE)


def remove_marks(folder: RunFolder) -> None:
    """Remove what was for the workers alone, and Ray Train's own records; on the driver, at the end."""
    try:
        folder.delete(*FOR_WORKERS, *RECORDS_OF_RAY)
    except OSError as error:
        logger.warning("%s: leftovers stay there (%s)", folder.shown, error)


def ask_to_stop(folder: RunFolder) -> None:
    """Ask the workers to write a checkpoint of the current update, or of the next, and to end."""
    if not folder.is_lost:  # else it is another run that would stop
        (folder.path / STOP_FILE).touch()  # no more: in a signal handler


def stop_asked(job: Job) -> bool:
    """Check, on a worker, whether the driver has called `ask_to_stop`, or has lost the folder in the same process."""
    if job.folder.is_lost:
        return True
    with suppress(OSError):  # storage that fails for a moment
        return (job.output_dir / STOP_FILE).exists()
    return False
