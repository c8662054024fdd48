"""A sweep's trial: one run of `fit` in a process of Ray Tune, which continues with the next trial.

    replay what the folder already has -> train -> validate and report -> ... -> report how it ended

What was trained before, by this process or by one that was killed, is reported again from the trial's folder before
anything is trained. So Tune's scheduler and searcher learn all that is known; a trial that has ended only replays.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from raycontrolnet.cluster.resources import worker_resources
from raycontrolnet.config.sweepable import cache_settings
from raycontrolnet.errors import RunError, UserError
from raycontrolnet.launch.checked_run import CheckedRun
from raycontrolnet.launch.fit import Trained, run_and_record
from raycontrolnet.launch.workers import train_here, train_on_ray
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training import store_sync
from raycontrolnet.training.run_callback import RunStopped
from raycontrolnet.training.status import RunStatus
from raycontrolnet.tune.checks import settings_of_trial
from raycontrolnet.tune.concurrency import TrialSlots
from raycontrolnet.tune.lease import SweepLease
from raycontrolnet.tune.records import Report, TrialRecord, read_reports, run_folder_of
from raycontrolnet.tune.trial_function import TuneCallback

logger = logging.getLogger(__name__)

REPLAYED = "replayed"
"""Marks a report of an earlier part of the sweep, which the scheduler has judged before."""
RECORD_KEY = "trial"
"""Key of Tune's config, beside the settings, with the rest of the trial's record."""

_failed_on_gpu = False
"""True once a training on a GPU has failed in this process: its memory and context may be unusable."""


@dataclasses.dataclass(frozen=True)
class Shared:
    """The part that all trials of a sweep have in common."""

    lease: SweepLease
    runs: Mapping[str, CheckedRun]
    """The sweep's own run, from which a trial differs by its settings, for each latent cache; see `cache_key`."""
    slots: TrialSlots
    retries: int
    """Number of new attempts after a training has failed."""
    mixed_precision: str | None = None
    """Precision of trials that name none."""

    def run_of(self, record: TrialRecord) -> CheckedRun:
        """Return the run of a trial, which starts at its last checkpoint."""
        some = next(iter(self.runs.values()))
        base = self.runs[cache_key(record.settings, buckets=some.config.aspect_buckets)]
        folder = run_folder_of(self.lease.folder, record, f"trial-{self.lease.sweep_id}")
        folder.path.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_leftovers(folder.path)
        own = {**record.settings, "output_dir": folder.place}
        config = settings_of_trial(base.config, own, self.mixed_precision)
        start = None if record.ended else folder.latest_sound()
        return dataclasses.replace(base, config=config, folder=folder, start=start, run_id=uuid.uuid4().hex)


def cache_key(settings: Mapping[str, Any], *, buckets: bool) -> str:
    """Return a key that is equal for trials which train from the same latents."""
    return repr([(name, settings[name]) for name in cache_settings(settings, buckets=buckets)])


def trial_config(record: TrialRecord) -> dict[str, Any]:
    """Return the trial as Tune's config: its settings, and the rest of its record."""
    rest = {name: value for name, value in dataclasses.asdict(record).items() if name != "settings"}
    return {**record.settings, RECORD_KEY: rest}


def record_from(config: Mapping[str, Any]) -> TrialRecord:
    """Return the record that `trial_config` made a config of."""
    settings = {name: value for name, value in config.items() if name != RECORD_KEY}
    return TrialRecord(settings=settings, **config[RECORD_KEY])


class Outcome(NamedTuple):
    """The end of a training."""

    state: str
    """finished, failed or interrupted."""
    cause: str | None = None
    attempts: int = 0


def run_trial(config: Mapping[str, Any], shared: Shared) -> None:
    """Run a trial of the sweep: Tune's function, after `trial_function`.

    Raises:
        RunStopped: the last report has been answered, or Tune stopped the trial.
    """
    if _failed_on_gpu:
        raise RuntimeError("The previous trial failed on this GPU; restarting in a new process.")
    record = record_from(config)
    with shared.lease.followed():
        shared.lease.check()
        run = shared.run_of(record)
        callback = TuneCallback(
            run.folder,
            run.config.validation_steps,
            goes_on=shared.lease.stands,
            sent=store_sync.RECORDS if shared.slots.in_process else (),  # else the workers send them
        )
        with _in_step(run.folder):
            known = _known(run, record)
            for report in known[:-1] if record.ended else known:
                callback.report({**report, REPLAYED: True}, with_checkpoint=False)
            if record.ended:
                last: Mapping[str, Any] = {**(known[-1] if known else {}), REPLAYED: True, "state": record.state}
            else:
                outcome = _train(run, record, shared, callback)
                last = {**(callback.last_report() if outcome.state == "finished" else {}), **outcome._asdict()}
        callback.report({**last, "done": True})


@contextmanager
def _in_step(folder: RunFolder) -> Iterator[None]:
    """Keep the trial's folder in step with an object store; what is there does not stay on this machine."""
    try:
        with store_sync.driver_in_step(folder):
            yield
    except RunStopped:
        _remove_working_folder(folder)
        raise
    _remove_working_folder(folder)


def _remove_working_folder(folder: RunFolder) -> None:
    if folder.is_stored:
        shutil.rmtree(folder.path, ignore_errors=True)


def _known(run: CheckedRun, record: TrialRecord) -> list[Report]:
    """Return the reports of an earlier part of the sweep that still count."""
    trained = run.start.step if run.start else 0
    until = record.stopped_at if record.ended else trained
    reports = read_reports(run.output_dir, run.config.validation_steps)
    return [report for report in reports if until is None or report["step"] <= until]


def _train(run: CheckedRun, record: TrialRecord, shared: Shared, callback: TuneCallback) -> Outcome:
    """Train, with retries.

    Raises:
        RunStopped: Tune stopped the trial.
    """
    global _failed_on_gpu
    for attempt in range(shared.retries + 1):
        try:
            _train_once(run, shared, callback)
            return Outcome("finished", attempts=attempt)
        except RunStopped:
            if callback.stopped:
                raise
            return Outcome("interrupted")
        except (UserError, RunError) as error:
            cause = str(error).splitlines()[0]
            if isinstance(error, RunError) and attempt < shared.retries:
                logger.warning("trial %s failed (%s); trying it again", record.name, cause)
                run = shared.run_of(record)
                continue
        except (Exception, SystemExit) as error:  # a library's exit would end the thread without a word
            logger.exception("trial %s failed", record.name)
            cause = f"{type(error).__name__}: {error}"
        break
    _failed_on_gpu = shared.slots.use_gpu
    return Outcome("failed", cause, attempt + 1)


def _train_once(run: CheckedRun, shared: Shared, callback: TuneCallback) -> None:
    slots = shared.slots

    def train(status: RunStatus) -> Trained:
        if slots.in_process:
            how: dict[str, Any] = {"use_gpu": slots.use_gpu, "threads": slots.threads, "callback": callback}
            return run, train_here(run, status, nowhere, **how)
        return run, train_on_ray(run, worker_resources(run.config), status, nowhere, callback=callback)

    with Path(os.devnull).open("w") as nowhere:
        run_and_record(run, train, nowhere, time.time())
