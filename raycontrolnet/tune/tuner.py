"""Ray Tune, set up for a sweep: searcher, scheduler and trials."""

from __future__ import annotations

import logging
import shutil
from fnmatch import fnmatchcase
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from raycontrolnet.cluster import tuning
from raycontrolnet.cluster.worker import remove_ray_records
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.storage.stored_folder import StoredFolder
from raycontrolnet.training.host_memory import variables_of_workers
from raycontrolnet.tune.lease import SweepLease
from raycontrolnet.tune.plan import SweepPlan
from raycontrolnet.tune.recorder import NotPickled, TrialRecorder
from raycontrolnet.tune.records import TRIALS_FOLDER
from raycontrolnet.tune.searcher import searcher_of
from raycontrolnet.tune.trial import REPLAYED, Shared, record_from, run_trial
from raycontrolnet.tune.trial_function import trial_function

logger = logging.getLogger(__name__)

STEP = "step"
"""The figure by which Tune's schedulers count; every report has it."""
TUNE_CHECKPOINT = "checkpoint_[0-9]*"
"""Names of Tune's checkpoints; ours are `checkpoint-N`."""


class _EndsWithLease(NotPickled, tune.Stopper):
    """Ends all trials once the sweep is no longer this driver's."""

    def __init__(self, lease: SweepLease):
        self._lease = lease

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return not self._lease.stands()


def run_trials(plan: SweepPlan, shared: Shared, recorder: TrialRecorder, lease: SweepLease) -> tune.ResultGrid:
    """Run the trials that are left, until all have ended or the sweep is no longer this driver's.

    Tune stores its checkpoints, which name ours, in the trials' own folders: there its results lead to.
    """
    slots = shared.slots
    _remove_tunes_checkpoints(plan.folder)
    trainable = tune.with_resources(
        tune.with_parameters(trial_function(run_trial), shared=shared),
        tune.PlacementGroupFactory([slots.resources()]),
    )
    # A process whose GPU has failed hands its next trial to a new one, which Tune counts as a failure.
    max_failures = max(plan.train.max_failures, int(slots.use_gpu))
    try:
        with tuning.tune_environment({} if slots.use_gpu else variables_of_workers()):
            return tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    metric=plan.config.objective,
                    mode=plan.mode,
                    search_alg=searcher_of(plan, recorder.propose),
                    scheduler=_scheduler(plan),
                    num_samples=len(plan.begun) + len(plan.new_indices),
                    max_concurrent_trials=slots.at_a_time,
                    reuse_actors=True,
                    trial_dirname_creator=lambda trial: record_from(tuning.config_of(trial)).name,
                ),
                run_config=tune.RunConfig(
                    name=TRIALS_FOLDER,
                    storage_path=plan.folder.place,
                    failure_config=tune.FailureConfig(max_failures=max_failures),
                    checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_at_end=False),
                    callbacks=[recorder],
                    stop=_EndsWithLease(lease),
                    verbose=0,
                ),
            ).fit()
    finally:
        if not lease.taken_over():
            _remove_tunes_files(plan.folder)


def _remove_tunes_checkpoints(folder: RunFolder) -> None:
    """Remove Tune's checkpoints of an earlier part of the sweep, which have the same names."""
    if folder.is_stored:
        folder.delete(f"{TRIALS_FOLDER}/*/{TUNE_CHECKPOINT}")
    for checkpoint in folder.path.glob(f"{TRIALS_FOLDER}/*/{TUNE_CHECKPOINT}"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def _remove_tunes_files(folder: RunFolder) -> None:
    """Remove Ray's own records, which the trials' folders replace."""
    if isinstance(folder, StoredFolder):
        names = [name.removeprefix(f"{TRIALS_FOLDER}/") for name in folder.store.list(TRIALS_FOLDER)]
        own = [name for name in names if "/" not in name or fnmatchcase(name, "*/error.*")]
        try:
            folder.store.delete(f"{TRIALS_FOLDER}/{name}" for name in own)
        except OSError as error:
            logger.warning("%s: Ray's own records stay there (%s)", folder.shown, error)
        return
    trials = folder.path / TRIALS_FOLDER
    remove_ray_records(trials)
    for file in (*trials.glob("[!.]*"), *trials.glob("*/error.*")):
        if file.is_file():
            file.unlink()


# Both record replayed reports, and stop no trial for them: they were judged before.


class _Asha(ASHAScheduler):
    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if result.get(REPLAYED) else decision


class _Median(MedianStoppingRule):
    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get(REPLAYED):
            self.on_trial_complete(tune_controller, trial, result)  # which only records
            return TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        # It pauses while there are too few trials to compare with: the trial would start anew in another process.
        return TrialScheduler.CONTINUE if decision == TrialScheduler.PAUSE else decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if STEP in result and self.metric in result:  # a trial that fails has none
            super().on_trial_complete(tune_controller, trial, result)


def _scheduler(plan: SweepPlan) -> TrialScheduler:
    """Return the scheduler that stops weak trials; it does not judge the report with which a trial ends."""
    grace_period = plan.grace_period
    if grace_period is None or grace_period >= plan.total_updates:
        return FIFOScheduler()
    if plan.config.scheduler == "median":
        return _Median(time_attr=STEP, grace_period=grace_period)
    return _Asha(
        time_attr=STEP,
        grace_period=grace_period,
        max_t=plan.total_updates,
        reduction_factor=plan.config.reduction_factor,
        stop_last_trials=False,
    )
