"""A run in an object store: what driver and workers send to it and fetch from it while the run goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

from raycontrolnet.config.output_settings import WEIGHTS_NAME, OutputConfig
from raycontrolnet.errors import ConfigError, RunError
from raycontrolnet.signals import haste
from raycontrolnet.storage.folder_lock import locked
from raycontrolnet.storage.left_requests import made_in_any_case
from raycontrolnet.storage.lock import HeldLock
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.storage.store_lock import store_locked
from raycontrolnet.storage.stored_folder import StoredFolder
from raycontrolnet.storage.uri import UNUSABLE, check_bucket, unusable
from raycontrolnet.text import error_message
from raycontrolnet.training import held_out, metrics, validation
from raycontrolnet.training.background import repeating
from raycontrolnet.training.failures import FAILURE_FILE, HANG_FILE
from raycontrolnet.training.job import Job
from raycontrolnet.training.run_log import RUN_LOG
from raycontrolnet.training.run_marks import STOP_FILE
from raycontrolnet.training.timings import TIMINGS_FILE

logger = logging.getLogger(__name__)

RECORDS = (metrics.METRICS_FILE, held_out.HELD_OUT_FILE, metrics.LEFT_OUT_FILE, TIMINGS_FILE)
"""Files of the worker of rank 0."""
VALIDATION = f"{validation.VALIDATION_FOLDER}/*"
DRIVERS = ("run.json", RUN_LOG, "config.yaml", "report.html", "README.md", "images/*")
WEIGHTS = f"{WEIGHTS_NAME}*"
MODEL_CONFIG = "config.json"

PASS_ON_INTERVAL_S = 0.5
FETCH_INTERVAL_S = 3.0
SEND_INTERVAL_S = 10.0
DRIVERS_INTERVAL_S = 30.0
COST_FACTOR = 20.0
"""The pause after sending or fetching is at least this many times the seconds that it took."""


def final_files(output: OutputConfig) -> tuple[str, ...]:
    """Return the names of the final weights, in the order in which they are written: whole once the last is there."""
    return tuple(name for name in (WEIGHTS, output.single_file, MODEL_CONFIG) if name)


@contextmanager
def run_folder_open(folder: RunFolder) -> Iterator[None]:
    """Hold the folder's lock for a run, and keep an object store in step with this machine.

    Raises:
        ConfigError: another run has the folder, or there is no such store.
        RunError: if the last records cannot be written, or another run has taken the folder over.
    """
    with locked(folder.path, folder.shown, folder.close) as lock, _ended_if_lost(folder, lock):
        if not isinstance(folder, StoredFolder):
            yield
            return
        with ExitStack() as stack:
            try:
                check_bucket(folder.place)
                store_lock = stack.enter_context(store_locked(folder.store))
                stack.enter_context(_ended_if_lost(folder, store_lock))
                stack.enter_context(driver_in_step(folder))
            except UNUSABLE as error:
                raise ConfigError([f"--output_dir={folder.shown}: {unusable(error)}"]) from None
            yield


@contextmanager
def _ended_if_lost(folder: RunFolder, lock: HeldLock) -> Iterator[None]:
    """Give signs of life; if another run has taken the folder over, as after a cut of the network, this one ends soon.

    Workers in this process see that by `stop_asked`; those on Ray are ended by `aborted_if_lost`.

    Raises:
        RunError: it has; says which one.
    """
    try:
        with repeating(lock.beat, lock.interval_s, "lock"):
            yield
    except Exception as error:
        if lock.lost is None:
            raise
        raise _taken_over(folder, lock.lost) from error
    if lock.lost is not None:  # as its last files were written
        raise _taken_over(folder, lock.lost)


def _taken_over(folder: RunFolder, reason: str) -> RunError:
    problem = f"{reason}; this one has ended. Leave the folder to that one, or name another --output_dir"
    return RunError(f"--output_dir={folder.shown}: {problem}")


def aborted_if_lost(folder: RunFolder, abort: Callable[[], None]) -> AbstractContextManager[None]:
    """Call `abort` now and then once another run has taken the folder over: workers would write there still."""
    return repeating(lambda: abort() if folder.is_lost else None, PASS_ON_INTERVAL_S, "lost folder")


@contextmanager
def driver_in_step(folder: RunFolder) -> Iterator[None]:
    """Keep a run's folder in step with an object store, if it is in one.

    Fetch the records of earlier parts of the run; send the driver's files while it goes on, and at the end.

    Raises:
        OSError: if there is no such store, or it cannot be read.
        RunError: if the last records cannot be written.
    """
    if not folder.is_stored:
        yield
        return
    folder.pull(*RECORDS, VALIDATION, *DRIVERS)

    def send_last(tries: int | None) -> None:
        folder.push(*DRIVERS, tries=tries)
        folder.delete(TIMINGS_FILE)  # run.json has them

    with (
        last_records_sent(folder, send_last, "run", state=DRIVERS[0]),
        repeating_by_cost(lambda: folder.push(*DRIVERS), DRIVERS_INTERVAL_S, "store"),
    ):
        yield


@contextmanager
def last_records_sent(
    folder: RunFolder, send: Callable[[int | None], None], what: str, *, state: str
) -> Iterator[None]:
    """Send the last records of `what` to an object store after the `with` block, with 2 tries where that fails.

    Args:
        state: the file that says how it ended, which is sent even after a second signal.

    Raises:
        RunError: the work is finished, and they cannot be written.
    """

    def send_state() -> None:
        if haste().has_begun and isinstance(folder, StoredFolder):  # else `send` has done it
            folder.store.upload(folder.path / state, state, 1)  # not `push`, which others of this process wait for

    with made_in_any_case(send_state):
        try:
            yield
        except BaseException:
            with suppress(OSError):
                send(2)
            raise
        try:
            send(None)
        except OSError as error:
            problem = f"the {what} is finished, but its last records cannot be written ({error_message(error, 200)})"
            raise RunError(f"--output_dir={folder.shown}: {problem}; they are in {folder.path}") from error


@contextmanager
def records_fetched(folder: RunFolder) -> Iterator[None]:
    """Fetch what the workers write while they are at work, and once more at the end; pass on the wish to end."""
    if not folder.is_stored:
        yield
        return

    def fetch() -> None:
        folder.pull(*RECORDS, VALIDATION, FAILURE_FILE, HANG_FILE)

    def pass_on() -> None:
        if (folder.path / STOP_FILE).exists() and not folder.is_lost:  # else it is another run that would stop
            folder.push(STOP_FILE, tries=2)

    with (
        _and_at_the_end(fetch),
        repeating_by_cost(fetch, FETCH_INTERVAL_S, "records"),
        repeating(pass_on, PASS_ON_INTERVAL_S, "stop"),
    ):
        yield


@contextmanager
def worker_in_step(job: Job, rank: int, log: str) -> Iterator[None]:
    """Send what this worker writes, while it is at work and at the end; note the driver's wish to end."""
    folder = job.folder
    if not folder.is_stored:
        yield
        return
    sent: tuple[str, ...] = (FAILURE_FILE,) if job.local else (FAILURE_FILE, log)
    if rank == 0:
        if not job.local:
            folder.pull(*RECORDS)
        sent += (*RECORDS, job.config.logging_pattern)
    with ExitStack() as stack:
        stack.enter_context(_and_at_the_end(lambda: folder.push(*sent)))
        stack.enter_context(repeating_by_cost(lambda: folder.push(*sent), SEND_INTERVAL_S, "store"))
        if not job.local:
            stack.enter_context(repeating(lambda: folder.pull(STOP_FILE), FETCH_INTERVAL_S, "stop"))
        yield


@contextmanager
def _and_at_the_end(work: Callable[[], None]) -> Iterator[None]:
    """Do `work` after the `with` block, however it ends; log its errors."""
    try:
        yield
    finally:
        try:
            work()
        except OSError as error:
            logger.warning("the last records: %s", error)


def repeating_by_cost(work: Callable[[], None], interval_s: float, name: str) -> AbstractContextManager[None]:
    """Do `work` in a thread, with pauses that suit its cost."""
    next_at = 0.0

    def due() -> None:
        nonlocal next_at
        if (started := time.monotonic()) >= next_at:
            work()
            ended = time.monotonic()
            next_at = ended + COST_FACTOR * (ended - started)

    return repeating(due, interval_s, name)
