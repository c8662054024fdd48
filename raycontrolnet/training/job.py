"""The job that the driver hands to the workers, and the files by which they know of each other."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from raycontrolnet.cluster.worker import RECORDS_OF_RAY
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.records import Size
from raycontrolnet.data.stream import BatchLoader
from raycontrolnet.errors import UserError
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.performance import working_precision
from raycontrolnet.quiet import MODEL_LIBRARIES, no_progress_bars
from raycontrolnet.sampling.images import ImageItem
from raycontrolnet.sampling.pipeline import DrawOptions
from raycontrolnet.storage.checkpoint import Checkpoint
from raycontrolnet.storage.files import is_closed, replace_text
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.storage.stored_folder import StoredFolder
from raycontrolnet.storage.uri import UNUSABLE
from raycontrolnet.text import error_message
from raycontrolnet.training import held_out, metrics, validation
from raycontrolnet.training.failures import FAILURE_FILE, HANG_FILE

logger = logging.getLogger(__name__)

RUN_LOG = "run.log"
RUN_ID_FILE = ".run_id"
STOP_FILE = ".stop"
"""File by which the driver asks the workers to write a checkpoint and end."""
TIMINGS_FILE = ".timings.json"
FOR_WORKERS = (FAILURE_FILE, HANG_FILE, RUN_ID_FILE, STOP_FILE)
"""Files that mean something only while a run goes on."""
SHARED_WITHIN_S = 15.0
"""Time that a network file system may take to show a worker what the driver wrote."""
MARK_INTERVAL_S = 0.5
"""Time between two looks."""


@dataclass(frozen=True)
class Job:
    """Plain data for every worker, without secrets but for the token, which repr leaves out."""

    config: TrainConfig
    """With absolute paths, a seed, and no hub_token."""
    folder: RunFolder
    """The run's folder, as the workers use it."""
    run_id: str
    num_samples: int
    """N, samples per epoch."""
    num_held_out: int
    start: Checkpoint | None
    """Start of the run; after a failure it continues from its own last checkpoint."""
    use_gpu: bool
    cached: bool
    """True if samples come from the latent cache."""
    interpolation: str
    """Resizing of images."""
    bucket_sizes: tuple[Size, ...]
    """Sizes of the aspect buckets; none for the resolution squared."""
    threads: int | None
    """CPU threads of a worker; None leaves them."""
    validation_items: tuple[ImageItem, ...]
    facts: Mapping[str, Any]
    """Settings, data and versions for the checkpoints' manifests."""
    token: str | None = field(default=None, repr=False)
    submitted: float = field(default_factory=time.time)
    """Unix seconds."""
    loader: BatchLoader | Any = None
    """For workers on Ray a reference to it in Ray's object store."""
    actor_options: Mapping[str, Any] | None = None
    """Ray's options for an actor that draws validation images beside the training; None if there is no room."""
    callback: RunCallback | None = None
    """Callback of a run in the caller's process."""

    @property
    def local(self) -> bool:
        """True for a run in the caller's process, without Ray Data."""
        return isinstance(self.loader, BatchLoader)

    @property
    def output_dir(self) -> Path:
        """The folder to write to on this machine."""
        return self.folder.path

    def images_of(self, step: int, family: Family) -> validation.StepImages:
        """Return the validation images of `step`, to be drawn with a base model of `family`."""
        asked = self.config.guidance_scale
        options = DrawOptions(
            self.config.resolution,
            guidance_scale=family.guidance_scale if asked is None else asked,
            precision=working_precision(self.config.mixed_precision),
            measure=self.config.control_fidelity,
            interpolation=self.interpolation,
            sampler=family.sampler,
            bucket_sizes=self.bucket_sizes,
        )
        return validation.StepImages(self.output_dir, step, self.validation_items, options)

    def current_checkpoint(self) -> Checkpoint | None:
        """Return this run's last undamaged checkpoint on this machine, or its start.

        Raises:
            UserError: if the one in an object store is damaged.
        """
        found = self.folder.last(self.run_id) or self.start
        if found is None or not self.folder.is_stored:
            return found
        try:
            return self.folder.sound(found)
        except ValueError as error:
            problem = f"--output_dir={self.folder.shown}: {found.path.name}: {error}"
            raise UserError(f"{problem}; go on with --resume_from_checkpoint of an earlier one") from None


def begin(folder: RunFolder, job: Job) -> None:
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


def end(folder: RunFolder) -> None:
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


def write_timings(output_dir: Path, timings: Mapping[str, float], processes: int) -> None:
    """Write the seconds by phase so far and the number of processes that train: for the report, or a failed run."""
    replace_text(output_dir / TIMINGS_FILE, json.dumps({"processes": processes, "timings": timings}))


def read_timings(output_dir: Path) -> dict[str, Any]:
    """Return what `write_timings` wrote last, under run.json's names; empty if there is nothing."""
    with suppress(FileNotFoundError):
        return dict(json.loads((output_dir / TIMINGS_FILE).read_text()))
    return {}


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


class RunStopped(BaseException):
    """The run was ended from outside, which is no failure; what it has written stands."""


class RunCallback(Protocol):
    """Receiver of a run's progress, in the training thread or one beside it; raises `RunStopped` to end the run."""

    def updated(self) -> None:
        """Do what is due after every update, or every second."""

    def validated(self, step: int) -> None:
        """Do what is due after the validation of `step`, but the last; its figures and a checkpoint are written."""
