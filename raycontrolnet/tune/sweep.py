"""The driver of a sweep: `sweep(config) -> SweepResult`, many runs of `fit` on Ray Tune.

    check everything -> one latent cache -> Tune (searcher -> trials -> scheduler) -> leaderboard, best/, report

The trials' folders are the only record: a sweep that is resumed proposes the same trials again, which report what they
have found and train what is left.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from ray import tune

from raycontrolnet.cluster.logs import logging_to, shown_on
from raycontrolnet.cluster.nodes import cluster_nodes, gpu_types
from raycontrolnet.cluster.resources import worker_resources
from raycontrolnet.cluster.session import on_a_cluster, ray_session
from raycontrolnet.config.checks import check_device
from raycontrolnet.config.sweep_config import SweepConfig
from raycontrolnet.errors import Interrupted, RunError, UserError, end_told, explained_once, root_cause
from raycontrolnet.launch.needs import StepSpec
from raycontrolnet.launch.needs_beside import counting
from raycontrolnet.report.live_report import live_report
from raycontrolnet.report.page import REPORT_FILE
from raycontrolnet.signals import ended_in_order, ending_signals_raised, haste
from raycontrolnet.storage.files import removed_if_empty
from raycontrolnet.text import counted, duration, one_line
from raycontrolnet.tune.concurrency import trial_slots
from raycontrolnet.tune.heaviest import heaviest, say_heaviest
from raycontrolnet.tune.leaderboard import LEADERBOARD_FILE
from raycontrolnet.tune.lease import SweepLease
from raycontrolnet.tune.live import LiveTable
from raycontrolnet.tune.plan import SweepPlan, plan_sweep, share
from raycontrolnet.tune.recorder import TrialRecorder, mark_interrupted
from raycontrolnet.tune.records import (
    Trial,
    read_records,
    read_sweep,
    write_record,
    write_sweep,
)
from raycontrolnet.tune.report.history import too_early
from raycontrolnet.tune.report.sweep_report import write_report
from raycontrolnet.tune.results import BEST_FOLDER, push_best, ranked_trials, write_results
from raycontrolnet.tune.store_sync import SWEEP_LOG, fetch_records, sweep_in_step
from raycontrolnet.tune.table import repeated, trial_table
from raycontrolnet.tune.tuner import run_trials

logger = logging.getLogger(__name__)

MOST_SHOWN = 10
"""Trials of a finished sweep that the terminal shows; leaderboard.csv has all."""


@dataclass(frozen=True)
class SweepResult:
    """The results of a finished sweep."""

    output_dir: Path
    """Folder of the sweep; this machine's part of it if it is in an object store."""
    trials: Sequence[Trial]
    """The best first."""
    best: Trial | None
    """None if no trial has weights."""
    best_dir: Path | None
    """The weights of the best, as diffusers loads them, its settings and its model card."""
    objective: str
    seconds: float
    grid: tune.ResultGrid | None = None
    """Ray Tune's results of the trials, ended ones included; None if nothing was left to run. `checkpoint_folder` of
    `raycontrolnet.tune` leads from a result's checkpoint to the weights."""
    uri: str | None = None
    """Folder of the sweep in an object store."""

    @property
    def value(self) -> float | None:
        """The objective of the best trial."""
        return self.best.value(self.objective) if self.best else None


def sweep(config: SweepConfig, *, stream: TextIO | None = None) -> SweepResult:
    """Train many ControlNets that differ by some settings, and rank them.

    Uses Ray as `fit` does.

    Args:
        config: all settings.
        stream: where the table of trials is shown; standard error by default.

    Raises:
        UserError: bad settings, data, models or space, before any trial starts (exit code 2 on the command line).
        RunError: no trial came to a validation (exit code 1).
        Interrupted: Ctrl-C or SIGTERM (exit code 130, 143); trials continue from their last checkpoints with `resume`.
    """
    folder = Path(config.train.output_dir).expanduser()
    with shown_on(stream) as shown, ending_signals_raised(), removed_if_empty(folder):
        return _sweep(config, shown)


def _sweep(config: SweepConfig, stream: TextIO) -> SweepResult:
    started = time.time()
    plan = plan_sweep(config, stream)
    lease = SweepLease(plan.folder, uuid.uuid4().hex)
    with (
        logging_to(plan.sweep_dir / SWEEP_LOG),
        sweep_in_step(plan.folder, lease),
        _recorded(plan, lease, started, stream) as facts,
    ):
        _settle(plan)  # trials of a part that was killed
        grid = _run(plan, lease, facts, stream) if plan.num_left else None
        fetch_records(plan.folder)
        trials = ranked_trials(plan)
        if not any(trial.reports for trial in trials):
            cause = next((trial.record.cause for trial in trials if trial.record.cause), "none is known")
            raise RunError(f"No trial has come to a validation. The first cause: {cause}")
        write_results(plan, trials, facts)
    return _finish(plan, trials, facts, grid, stream)


def _run(plan: SweepPlan, lease: SweepLease, facts: dict[str, Any], stream: TextIO) -> tune.ResultGrid:
    train = plan.train
    own, found = not on_a_cluster(train.address), heaviest(plan)
    sizes = found.run.buckets.sizes if found.run.buckets else ()
    step = StepSpec(found.run.config, found.run.token, found.run.cached, sizes)
    with counting(step) as needs, ray_session(train.address):
        slots = trial_slots(train, plan.config, cluster_nodes(train), plan.num_left, own=own)
        for tried in plan.device_settings():
            check_device(slots.use_gpu, tried, has_gpu=slots.use_gpu)
        stream.write(f"sweep: {counted(plan.num_left, 'trial')}, {slots.reason}\n")
        resources = worker_resources(train)
        say_heaviest(
            plan,
            found,
            needs,
            stream,
            types=None if resources.one_machine else gpu_types(train),
            use_gpu=slots.use_gpu,
            share=min(1.0, slots.gpus_per_worker),
        )
        shared = share(plan, slots, lease, resources, stream)
        facts |= {"concurrency": slots.at_a_time, "reason": slots.reason, "mixed_precision": shared.mixed_precision}
        with _table(plan, stream) as table, ended_in_order(partial(_end, lease)):
            recorder = TrialRecorder(lease, plan.records, train.validation_steps, table)
            grid = run_trials(plan, shared, recorder, lease)
        if not lease.stands():
            raise Replaced(f"Another driver goes on with the sweep in {plan.folder.shown}; this one has ended.")
    return grid


def _table(plan: SweepPlan, stream: TextIO) -> LiveTable:
    name, objective = plan.folder.name, plan.config.objective
    return LiveTable(name, objective, stream, total_trials=plan.num_trials, total_steps=plan.total_updates)


class Replaced(RunError):
    """Another driver has taken the sweep over and writes its files now."""


def _end(lease: SweepLease) -> bool:
    """End the lease, and so the sweep's trials."""
    lease.remove()
    return True


@contextmanager
def _recorded(plan: SweepPlan, lease: SweepLease, started: float, stream: TextIO) -> Iterator[dict[str, Any]]:
    """Write sweep.json and the report at the start, now and then, and at the end, whatever that is."""
    ours, writing = True, threading.Lock()
    before = read_sweep(plan.sweep_dir)
    facts = {**plan.facts(), "status": "running", "started": before.get("started", started), "cause": None}

    def put_down() -> None:
        with writing:
            write_sweep(plan.sweep_dir, facts)

    def interrupted() -> None:
        if ours and facts["status"] == "running":
            facts["status"] = "interrupted"
            put_down()

    def write(_: Path) -> None:
        if not ours:
            return
        facts["seconds"] = round(before.get("seconds", 0.0) + time.time() - started, 3)
        facts["machine_seconds"] = round(sum(record.seconds for record in read_records(plan.sweep_dir)), 3)
        put_down()
        write_report(plan.sweep_dir)

    put_down()  # later with the report
    how_to_go_on = partial(_how_to_go_on, plan)
    told = end_told(stream, how_to_go_on, interrupted)
    with told, haste().at_its_end(interrupted), live_report(plan.sweep_dir, write):
        try:
            with (
                explained_once("The sweep", how_to_go_on, plan.sweep_dir / SWEEP_LOG),
                _results_so_far(plan, facts, put_down),
            ):
                yield facts
        except Replaced:
            ours = False
            raise
        finally:
            lease.remove()


@contextmanager
def _results_so_far(plan: SweepPlan, facts: dict[str, Any], put_down: Callable[[], None]) -> Iterator[None]:
    """Put down how the sweep ended; if it ends early, write the results so far as well."""
    try:
        yield
        facts["status"] = "finished"
    except Replaced:
        raise
    except BaseException as error:
        interrupted = isinstance(error, (KeyboardInterrupt, Interrupted))
        cause = str(error) if isinstance(error, (UserError, RunError)) else one_line(root_cause(error))
        facts |= {"status": "interrupted" if interrupted else "failed", "cause": None if interrupted else cause}
        try:
            put_down()  # before what may take long
            fetch_records(plan.folder)
            _settle(plan)
            write_results(plan, ranked_trials(plan), facts)
        except Exception:
            logger.exception("the results so far could not be written")  # the error itself matters more
        if isinstance(error, Interrupted):  # of the latents, whose command would begin the sweep anew
            raise Interrupted(f"Interrupted. {_how_to_go_on(plan)}") from None
        raise


def _how_to_go_on(plan: SweepPlan) -> str:
    records = read_records(plan.sweep_dir)
    ended = sum(record.ended for record in records)
    return (
        f"{ended} of {plan.num_trials} trials have ended and stand; the others go on from their last checkpoints with "
        f"the same command and --resume (--output_dir {plan.folder.shown})."
    )


def _settle(plan: SweepPlan) -> None:
    """Mark trials that were running when the sweep ended as interrupted."""
    for record in read_records(plan.sweep_dir):
        if (known := mark_interrupted(plan.sweep_dir, record)) != record:
            write_record(plan.sweep_dir, known)


def _finish(
    plan: SweepPlan, trials: Sequence[Trial], facts: Mapping[str, Any], grid: tune.ResultGrid | None, stream: TextIO
) -> SweepResult:
    """Show the results, push the best if that is wanted, and return them."""
    best = next((trial for trial in trials if trial.record.name == facts["best"]), None)
    if not plan.num_left:  # else they are shown already
        width = shutil.get_terminal_size().columns
        for line in trial_table(trials[:MOST_SHOWN], plan.config.objective, {}, plan.total_updates, width):
            stream.write(f"{line.plain}\n")
        if len(trials) > MOST_SHOWN:
            stream.write(f"... and {len(trials) - MOST_SHOWN} more in {LEADERBOARD_FILE}\n")
    stream.writelines(f"{line}\n" for line in repeated(trials))
    if doubt := too_early(trials, plan.config.scheduler, plan.config.objective):
        stream.write(f"{doubt}\n")
    result = SweepResult(
        output_dir=plan.sweep_dir,
        trials=trials,
        best=best,
        best_dir=plan.sweep_dir / BEST_FOLDER if best else None,
        objective=plan.config.objective,
        seconds=facts["seconds"],
        grid=grid,
        uri=plan.folder.shown if plan.folder.is_stored else None,
    )
    if plan.train.push_to_hub and best:
        stream.write(f"pushed to {push_best(plan, best, facts)}\n")
    learned = f"the best is in {plan.folder.shown}/{BEST_FOLDER}" if best else "no trial has weights"
    taken = duration(result.seconds) + (" altogether" if plan.records else "")  # with the parts before
    stream.write(f"done in {taken}: {learned}; report in {plan.folder.shown}/{REPORT_FILE}\n")
    return result
