"""Ray Tune, set up for a sweep: the searcher, the scheduler and the process of a trial are given to it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from raycontrolnet.tune.concurrency import TrialSlots
from raycontrolnet.tune.plan import SweepPlan
from raycontrolnet.tune.recorder import TrialRecorder
from raycontrolnet.tune.searcher import proposals
from raycontrolnet.tune.trial import REPLAYED, Shared, SweepTrial

TUNE_FILES = ".tune"
"""Tune's own records, which are nobody's: the trials' folders are."""
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # its table is not ours, and not to be silenced
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails early has nothing to be ranked by
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_trials(
    plan: SweepPlan, places: TrialSlots, shared: Shared, keeper: TrialRecorder, stopper: tune.Stopper
) -> None:
    """Run the trials that are left; returns when all have ended, or `stopper` ends them."""
    config = plan.config
    begun = [record for record in plan.records if record.state != "failed"]
    begun.sort(key=lambda record: (not record.ended, record.index))
    known = {record.index for record in plan.records}
    new = [index for index in range(plan.num_trials) if index not in known]
    assert plan.train.seed is not None
    searcher = proposals(
        plan.space,
        begun,
        keeper.propose,
        indices=new,
        searcher=config.searcher,
        seed=plan.train.seed,
        objective=config.objective,
        mode=plan.mode,
    )
    for leftover in plan.sweep_dir.glob(f"{TUNE_FILES}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    own = f"{TUNE_FILES}-{shared.marker.sweep_id[:8]}"
    trainable = tune.with_resources(
        tune.with_parameters(SweepTrial, shared=shared), tune.PlacementGroupFactory([places.resources()])
    )
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)  # it misses the logs that are switched off
    with _environment(ENVIRONMENT):
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                metric=config.objective,
                mode=plan.mode,
                search_alg=searcher,
                scheduler=_scheduler(plan),
                num_samples=len(begun) + len(new),
                max_concurrent_trials=places.at_a_time,
                reuse_actors=True,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=own,
                storage_path=str(plan.sweep_dir),
                failure_config=tune.FailureConfig(max_failures=plan.train.max_failures),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[keeper],
                stop=stopper,
                verbose=0,
            ),
        ).fit()
    shutil.rmtree(plan.sweep_dir / own, ignore_errors=True)


class _Unjudged:
    """A scheduler that takes replayed reports for the record and ends nothing for them: that was decided before."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)  # type: ignore[misc]
        return TrialScheduler.CONTINUE if result.get(REPLAYED) else decision


class _Asha(_Unjudged, ASHAScheduler):
    pass


class _Median(_Unjudged, MedianStoppingRule):
    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        if decision == TrialScheduler.CONTINUE:
            self._stopped_trials.discard(trial)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if self._time_attr in result and self._metric in result:  # a trial that fails has none
            super().on_trial_complete(tune_controller, trial, result)

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        return TrialScheduler.CONTINUE  # and not a pause, for which Tune would want a checkpoint of its own


def _scheduler(plan: SweepPlan) -> TrialScheduler:
    """What stops weak trials; a trial's last report, at its end, is not judged any more."""
    grace_period = plan.grace_period
    if grace_period is None or grace_period >= plan.total_updates:
        return FIFOScheduler()
    if plan.config.scheduler == "median":
        return _Median(time_attr="step", grace_period=grace_period)
    return _Asha(
        time_attr="step",
        grace_period=grace_period,
        max_t=plan.total_updates,
        reduction_factor=plan.config.reduction_factor,
        stop_last_trials=False,
    )


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set for a while."""
    before: dict[str, Any] = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
