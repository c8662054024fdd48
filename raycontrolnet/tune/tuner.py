"""Ray Tune, set up for a sweep: the searcher, the scheduler and the process of a trial are given to it."""

from __future__ import annotations

import shutil
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from raycontrolnet.cluster.tuning import tune_environment
from raycontrolnet.tune.concurrency import TrialSlots
from raycontrolnet.tune.plan import SweepPlan
from raycontrolnet.tune.recorder import TrialRecorder
from raycontrolnet.tune.searcher import proposals
from raycontrolnet.tune.trial import REPLAYED, Shared, SweepTrial

STEP = "step"
"""By which Tune's schedulers count, as every report has it."""
TUNE_FILES = ".tune"
"""Tune's own records, which are nobody's: the trials' folders are."""


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
    with tune_environment():
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


# Both take replayed reports for the record and end nothing for them: that was decided before.


class _Asha(ASHAScheduler):
    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if result.get(REPLAYED) else decision


class _Median(MedianStoppingRule):
    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get(REPLAYED):
            self.on_trial_complete(tune_controller, trial, result)  # takes it for the record, and judges nothing
            return TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, trial, result)
        # With too few trials to compare with it would pause, for which Tune wants a checkpoint of its own.
        return TrialScheduler.CONTINUE if decision == TrialScheduler.PAUSE else decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if STEP in result and self.metric in result:  # a trial that fails has none
            super().on_trial_complete(tune_controller, trial, result)


def _scheduler(plan: SweepPlan) -> TrialScheduler:
    """What stops weak trials; a trial's last report, at its end, is not judged any more."""
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
