"""A sweep in an object store: what its driver sends to it and fetches from it.

The driver works in a folder of its machine, as on a disk, and its trials in folders of theirs. The trials' weights stay
in the store, but for those of the best.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from raycontrolnet.errors import ConfigError
from raycontrolnet.report.page import REPORT_FILE
from raycontrolnet.storage.resume import SWEEP_FILE
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.storage.stored_folder import run_folder
from raycontrolnet.storage.uri import UNUSABLE, check_bucket, unusable
from raycontrolnet.training import store_sync
from raycontrolnet.training.store_sync import FETCH_INTERVAL_S, SEND_INTERVAL_S, last_records_sent, repeating_by_cost
from raycontrolnet.tune.leaderboard import LEADERBOARD_FILE
from raycontrolnet.tune.lease import LEASE_FILE, SweepLease
from raycontrolnet.tune.records import TRIAL_FILE, TRIALS_FOLDER

SWEEP_LOG = "sweep.log"
OF_TRIALS = (*store_sync.RECORDS, store_sync.VALIDATION, "run.json", "config.yaml")
"""Files that a trial writes and the driver reads."""
TRIAL_RECORDS = f"{TRIALS_FOLDER}/*/{TRIAL_FILE}"
DRIVERS = (REPORT_FILE, LEADERBOARD_FILE, SWEEP_LOG, TRIAL_RECORDS, SWEEP_FILE)
_fetching = threading.Lock()
"""Two that fetch the same file at a time would add to it twice."""


def open_sweep(place: str, logs: str) -> RunFolder:
    """Return the folder of a sweep, a path or URI, with the records of earlier parts of the sweep on this machine.

    Args:
        place: the path or URI.
        logs: pattern of the names of the trackers' files.

    Raises:
        ConfigError: there is no such store, or it cannot be read.
    """
    folder = run_folder(place)
    if folder.is_stored:
        try:
            check_bucket(folder.place)
            folder.pull(*DRIVERS, logs, *_of_trials("*"))
        except UNUSABLE as error:
            raise ConfigError([f"--output_dir={folder.shown}: {unusable(error)}"]) from None
    return folder


def fetch_records(folder: RunFolder, trial: str = "*") -> None:
    """Fetch what the trials, or the one of a name, have written.

    Raises:
        OSError: the store fails.
    """
    with _fetching:
        folder.pull(*_of_trials(trial))


def _of_trials(name: str) -> list[str]:
    return [f"{TRIALS_FOLDER}/{name}/{file}" for file in OF_TRIALS]


@contextmanager
def sweep_in_step(folder: RunFolder, lease: SweepLease) -> Iterator[None]:
    """Take the sweep over; keep the driver's folder in step with an object store while the sweep is this driver's.

    Raises:
        ConfigError: the store cannot be written.
        RunError: the last records cannot be written.
    """
    try:
        lease.set()
    except OSError as error:
        raise ConfigError([f"--output_dir={folder.shown}: {unusable(error)}"]) from None
    if not folder.is_stored:
        yield
        return

    def send() -> None:
        if lease.stands():
            folder.push(*DRIVERS)

    def send_last(tries: int | None) -> None:
        folder.pull(LEASE_FILE)
        if not lease.taken_over():
            folder.push(*DRIVERS, tries=tries)

    with (
        last_records_sent(folder, send_last, "sweep", state=SWEEP_FILE),
        lease.followed(),
        repeating_by_cost(lambda: fetch_records(folder), FETCH_INTERVAL_S, "records"),
        repeating_by_cost(send, SEND_INTERVAL_S, "store"),
    ):
        yield
