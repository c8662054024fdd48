"""run.log: what the package logs in the workers of a run."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from raycontrolnet.quiet import MODEL_LIBRARIES, no_progress_bars
from raycontrolnet.storage.files import is_closed
from raycontrolnet.training.job import Job

RUN_LOG = "run.log"


def log_of(job: Job, who: str) -> str:
    """Return the name of the log of one worker: run.log, but in an object store, where two cannot write one file."""
    if job.local or not job.folder.is_stored:
        return RUN_LOG
    return f"run-{who.replace(' ', '-')}-{socket.gethostname()}.log"


@contextmanager
def logging_to_run_log(job: Job, who: str) -> Iterator[None]:
    """Log what this package logs in a worker to run.log, without the libraries' progress bars."""
    package = logging.getLogger("raycontrolnet")
    log = job.output_dir / log_of(job, who)
    log.parent.mkdir(parents=True, exist_ok=True)  # of a validation actor on a machine without a worker
    if not log.exists():
        job.folder.pull(log.name)  # of an earlier part of the run
    handler = logging.FileHandler(log, encoding="utf-8")
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {who}: %(message)s"))
    handler.addFilter(lambda _: not is_closed(log))
    if not job.local:  # else this is the driver's process, which logs there already
        package.addHandler(handler)
        package.setLevel(logging.INFO)
    try:
        with no_progress_bars(*MODEL_LIBRARIES):
            yield
    finally:
        package.removeHandler(handler)
        handler.close()
