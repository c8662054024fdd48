"""A check on each worker: the folder, or the store, that it writes to is the one that the driver sees."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

from raycontrolnet.errors import UserError
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.storage.stored_folder import StoredFolder
from raycontrolnet.storage.uri import UNUSABLE
from raycontrolnet.text import error_message
from raycontrolnet.training.job import Job
from raycontrolnet.training.run_marks import FOR_WORKERS, RUN_ID_FILE

SHARED_WITHIN_S = 15.0
"""Time that a network file system may take to show a worker what the driver wrote."""
MARK_INTERVAL_S = 0.5
"""Time between two looks."""


def check_folder_is_shared(job: Job) -> None:
    """Check, on a worker, that the folder is the one that the driver sees: else results would stay on this machine.

    Raises:
        UserError: if it is another folder of the same name.
    """
    marker = job.output_dir / RUN_ID_FILE
    if isinstance(job.folder, StoredFolder):
        if not job.local:
            with job.folder.alone():
                if not (marker.is_file() and marker.read_text() == job.run_id):
                    job.folder.start_anew()
                check_store_is_seen(job.folder, RUN_ID_FILE, job.run_id, *FOR_WORKERS)
        return
    wait_for_driver(job.output_dir, lambda: marker.is_file() and marker.read_text() == job.run_id, "the driver")


def check_store_is_seen(folder: RunFolder, marker: str, content: str, *also: str) -> None:
    """Check, on a worker, that the file `marker` in an object store has the `content` that the driver wrote.

    Args:
        also: files to fetch as well.

    Raises:
        UserError: if it cannot be read, or is another one.
    """
    node, file = socket.gethostname(), folder.path / marker
    try:
        folder.pull(marker, *also)
    except UNUSABLE as error:
        problem = f"the node {node} cannot read it ({error_message(error, 200)})"
        raise UserError(f"--output_dir={folder.shown}: {problem}; give it the right to, as the driver has") from None
    if not (file.is_file() and file.read_text() == content):
        problem = f"the node {node} finds another store by that name; set its address there as for the driver"
        raise UserError(f"--output_dir={folder.shown}: {problem}, as AWS_ENDPOINT_URL")


def wait_for_driver(output_dir: Path, marked: Callable[[], bool], driver: str) -> None:
    """Wait until `output_dir` is `marked` by `driver`.

    Raises:
        UserError: if that takes longer than on storage that nodes share.
    """
    end = time.monotonic() + SHARED_WITHIN_S
    while not marked():
        if time.monotonic() > end:
            raise UserError(
                f"--output_dir={output_dir}: on the node {socket.gethostname()} this is not the folder that {driver} "
                "writes to; name a folder on storage that all nodes share"
            )
        time.sleep(MARK_INTERVAL_S)
