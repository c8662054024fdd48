"""A trial: one run of `fit` in a process of Ray Tune's, which goes on to the next trial when it has ended.

    Tune: setup -> step, step, ... -> reset_config -> step, ... -> cleanup
                   |  a report each: what the trial is worth so far
    thread:        train -> validate -> wait for the answer -> train -> ... -> finished, or RunStopped

Whatever was trained before, by this process or by one that was killed, is reported again from the trial's folder before
anything is trained: Tune's schedulers and searchers learn all that is known, and a trial that has ended only does that.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from ray import tune

from raycontrolnet.cluster.resources import worker_resources
from raycontrolnet.config.sweepable import cache_settings
from raycontrolnet.errors import RunError, UserError
from raycontrolnet.launch.fit import Summary, run_and_record
from raycontrolnet.launch.preflight import CheckedRun
from raycontrolnet.launch.workers import train_here, train_on_ray
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.training.job import RunStopped
from raycontrolnet.training.status import RunStatus
from raycontrolnet.tune.records import Report, SweepLease, TrialRecord, folder_of, read_reports

logger = logging.getLogger(__name__)

REPLAYED = "replayed"
"""Marks a report of what was known before: it is for the record, and not judged again."""
LOOK_INTERVAL_S = 0.5
"""How often a trial that has nothing to report looks whether its sweep goes on."""
END_WITHIN_S = 60.0


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all trials of a sweep have in common."""

    sweep_dir: Path
    marker: SweepLease
    runs: Mapping[str, CheckedRun]
    """The sweep's own run, from which a trial differs by its settings, for each latent cache; see `cache_key`."""
    in_process: bool
    """Whether a trial has a single worker, which is then the trial's own process."""
    use_gpu: bool
    threads: int | None
    """Of the trial's process on a CPU."""
    retries: int
    """How often a training that fails is tried again."""

    def run_of(self, record: TrialRecord) -> CheckedRun:
        """The run that the trial is, from its last checkpoint on."""
        base, folder = self.runs[cache_key(record.settings)], folder_of(self.sweep_dir, record)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_leftovers(folder)
        config = dataclasses.replace(base.config, **record.settings, output_dir=str(folder))
        start = checkpoints.latest(folder)
        return dataclasses.replace(base, config=config, output_dir=folder, start=start, run_id=uuid.uuid4().hex)


def cache_key(settings: Mapping[str, Any]) -> str:
    """Equal for trials that train from the same latents."""
    return repr([(name, settings[name]) for name in cache_settings(settings)])


class Outcome(NamedTuple):
    """How a training ended."""

    state: str
    """finished, failed or interrupted."""
    cause: str | None = None
    attempts: int = 0


class SweepTrial(tune.Trainable):
    """Ray Tune's side: every `step` returns the next report of the trial."""

    def setup(self, config: dict[str, Any], shared: Shared | None = None) -> None:
        assert shared is not None
        self._shared = shared
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        fit = self._training.end() and not (self._shared.use_gpu and self._training.failed)
        self._begin(new_config, fit=fit)
        return True  # of False, Tune would lose count of the trials that run

    def cleanup(self) -> None:
        self._training.end()

    def step(self) -> dict[str, Any]:
        if not self._fit:
            raise RuntimeError("the trial before has left this process in no state to go on; a new one takes over")
        return next(self._results)

    def _begin(self, config: Mapping[str, Any], *, fit: bool = True) -> None:
        self._fit = fit
        record = TrialRecord(**config)
        self._training = Training(self._shared, record)
        self._results = self._report(record)

    def _report(self, record: TrialRecord) -> Iterator[dict[str, Any]]:
        """What Tune gets, step by step; the last has `done`, and the state in which the trial ended."""
        run = self._shared.run_of(record)
        known = read_reports(run.output_dir, run.config.validation_steps)
        trained = run.start.step if run.start else 0
        until = record.stopped_at if record.ended else trained
        known = [report for report in known if until is None or report["step"] <= until]
        if record.ended:
            yield from ({**report, REPLAYED: True} for report in known[:-1])
            yield {**(known[-1] if known else {}), REPLAYED: True, "done": True, "state": record.state}
            return
        yield from ({**report, REPLAYED: True} for report in known)
        self._training.start(run)
        for outcome in self._training.events():
            last = self._last_report(run)
            if outcome is None:
                yield dict(last)
            else:
                worth = last if outcome.state == "finished" else {}
                yield {**worth, **outcome._asdict(), "done": True}

    def _last_report(self, run: CheckedRun) -> Report:
        reports = read_reports(run.output_dir, run.config.validation_steps)
        return reports[-1] if reports else {}


class Training:
    """The thread that trains, and its follower."""

    def __init__(self, shared: Shared, record: TrialRecord):
        self._shared, self._record = shared, record
        self._events: SimpleQueue[Outcome | None] = SimpleQueue()
        self._answered = threading.Semaphore(0)
        self._begun = threading.Event()
        self.failed = False
        self._over = False
        self._looked_at = 0.0
        self._thread: threading.Thread | None = None

    def start(self, run: CheckedRun) -> None:
        self._thread = threading.Thread(target=self._train, args=(run,), name=f"trial {self._record.name}", daemon=True)
        self._thread.start()

    def events(self) -> Iterator[Outcome | None]:
        """None for every validation, which is answered by asking for the next event; at last the outcome."""
        while True:
            try:
                event = self._events.get(timeout=LOOK_INTERVAL_S)
            except Empty:
                if self._begun.is_set() and not self._shared.marker.stands():
                    self.end()
                    self._events.put(Outcome("interrupted"))  # unless it has come to an end meanwhile
                continue
            yield event
            if event is not None:
                return
            self._answered.release()

    def end(self) -> bool:
        """End the training, if it is not at its end; returns whether it has ended in time."""
        self._over = True
        self._answered.release()
        if self._thread is not None:
            self._thread.join(END_WITHIN_S)
            return not self._thread.is_alive()
        return True

    def updated(self) -> None:
        now = time.monotonic()
        if now - self._looked_at > LOOK_INTERVAL_S:
            self._looked_at = now
            # Another driver may go on with the sweep before this process knows that its own is dead.
            self._over = self._over or not self._shared.marker.stands()
        if self._over:
            raise RunStopped

    def validated(self) -> None:
        self.updated()
        self._events.put(None)
        self._answered.acquire()
        self.updated()

    def _train(self, run: CheckedRun) -> None:
        for attempt in range(self._shared.retries + 1):
            try:
                self._train_once(run)
                self._events.put(Outcome("finished", attempts=attempt))
            except RunStopped:
                self._events.put(Outcome("interrupted"))
            except (UserError, RunError) as error:
                cause = str(error).splitlines()[0]
                if isinstance(error, RunError) and attempt < self._shared.retries:
                    logger.warning("trial %s failed (%s); it is tried again", self._record.name, cause)
                    run = self._shared.run_of(self._record)
                    continue
                self.failed = True
                self._events.put(Outcome("failed", cause, attempt + 1))
            except BaseException as error:  # noqa: BLE001 (a thread that ends without a word would be waited for forever)
                self.failed = True
                self._events.put(Outcome("failed", f"{type(error).__name__}: {error}", attempt + 1))
            return

    def _train_once(self, run: CheckedRun) -> None:
        shared = self._shared
        shared.marker.check()
        self._begun.set()

        def train(status: RunStatus) -> Summary:
            if shared.in_process:
                return train_here(run, status, nowhere, use_gpu=shared.use_gpu, threads=shared.threads, follower=self)
            return train_on_ray(run, worker_resources(run.config), status, nowhere, follower=self)

        with Path(os.devnull).open("w") as nowhere:
            run_and_record(run, train, nowhere, time.time())
