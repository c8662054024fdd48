"""The recorder of a running sweep: writes what Ray Tune tells the driver to trial.json."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayActorError

from raycontrolnet.cluster import tuning
from raycontrolnet.errors import RunError, UserError, root_cause
from raycontrolnet.storage.files import read_json
from raycontrolnet.text import one_line
from raycontrolnet.training.status import STATUS_FILE
from raycontrolnet.tune.lease import SweepLease
from raycontrolnet.tune.live import LiveTable
from raycontrolnet.tune.records import (
    TRIAL_FILE,
    TRIALS_FOLDER,
    Trial,
    TrialRecord,
    folder_of,
    read_trial,
    write_record,
)
from raycontrolnet.tune.store_sync import fetch_records
from raycontrolnet.tune.trial import record_from

logger = logging.getLogger(__name__)


class NotPickled:
    """A base for objects that hold the terminal, locks and open files: Tune pickles them, and None is restored."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


class TrialRecorder(NotPickled, tune.Callback):
    """The records of all trials, and the only writer of trial.json while the sweep is this driver's."""

    def __init__(self, lease: SweepLease, records: Sequence[TrialRecord], validation_steps: int, table: LiveTable):
        self._lease, self._validation_steps, self._table = lease, validation_steps, table
        self._sweep_dir = lease.sweep_dir
        self.trials: dict[int, Trial] = {}
        self._since: dict[int, float] = {}
        for record in records:
            self._read(record)
        self._show()

    def propose(self, record: TrialRecord) -> None:
        """Record a trial that will start or continue."""
        if not record.ended:
            self._write(dataclasses.replace(record, state="waiting"))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self._of(trial)
        if not record.ended:
            now = time.time()
            self._since[record.index] = now
            self._write(dataclasses.replace(record, state="running", started=record.started or now))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        record = self._of(trial)
        if not record.ended:
            self._write(self._timed(record))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record, last = self._of(trial), tuning.trial_report(trial)
        if record.ended:
            return
        changes: dict[str, Any] = {"state": "interrupted"}
        if state := last.get("state"):
            changes = {"state": state, "cause": last.get("cause"), "attempts": last.get("attempts", 0)}
        elif "step" in last:  # the scheduler stopped it before its last report
            changes = {"state": "stopped", "stopped_at": int(last["step"])}
        self._write(dataclasses.replace(self._timed(record), **changes))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._write(dataclasses.replace(self._timed(self._of(trial)), state="failed", cause=_cause(trial)))

    def _of(self, trial: Any) -> TrialRecord:
        return self.trials[record_from(tuning.config_of(trial)).index].record

    def _timed(self, record: TrialRecord) -> TrialRecord:
        """Add the time since the last call to `record`."""
        now = time.time()
        before = self._since.get(record.index, now)
        self._since[record.index] = now
        return dataclasses.replace(record, seconds=record.seconds + now - before)

    def _write(self, record: TrialRecord) -> None:
        known = self.trials.get(record.index)
        if self._lease.stands():
            write_record(self._sweep_dir, record)
            if known is None or known.record.state != record.state:
                self._send(record)
        self._read(record)
        self._show()

    def _send(self, record: TrialRecord) -> None:
        """Send trial.json to an object store at once: a trial whose settings are unknown cannot go on."""
        try:
            self._lease.folder.push(f"{TRIALS_FOLDER}/{record.name}/{TRIAL_FILE}", tries=2)
            if record.ended:
                fetch_records(self._lease.folder, record.name)
        except OSError as error:  # it is sent again with the others
            logger.warning("trial %s: %s", record.name, error)

    def _read(self, record: TrialRecord) -> None:
        self.trials[record.index] = read_trial(self._sweep_dir, record, self._validation_steps)

    def _show(self) -> None:
        self._table.update([self.trials[index] for index in sorted(self.trials)])


def _cause(trial: Any) -> str:
    """Return the reason why Tune gave a trial up."""
    error, times = tuning.trial_error(trial), tuning.trial_failures(trial)
    if error is None:
        return f"its process failed {times} times"
    cause = root_cause(error)
    if isinstance(cause, (UserError, RunError)):
        return str(cause).splitlines()[0]
    if isinstance(error, RayActorError):
        return f"its process was lost {times} times: killed, perhaps for its memory, or with its machine"
    return f"its process failed {times} times: {one_line(cause)}"


def mark_interrupted(sweep_dir: Path, record: TrialRecord) -> TrialRecord:
    """Return the record of a trial that a killed sweep left: finished if its run is, else interrupted."""
    if record.ended:
        return record
    finished = read_json(folder_of(sweep_dir, record) / STATUS_FILE).get("status") == "finished"
    return dataclasses.replace(record, state="finished" if finished else "interrupted")
