"""What a sweep leaves of its trials together: leaderboard.csv, best/, TensorBoard's hparams, the push of the best."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from raycontrolnet.run import export
from raycontrolnet.tune.best import weights_of, write_best
from raycontrolnet.tune.hparams import write_hparams
from raycontrolnet.tune.leaderboard import write_leaderboard
from raycontrolnet.tune.plan import SweepPlan
from raycontrolnet.tune.records import Trial, ranked, read_trials

logger = logging.getLogger(__name__)


def ranked_trials(plan: SweepPlan) -> list[Trial]:
    """All trials so far, the best first."""
    return ranked(read_trials(plan.sweep_dir, plan.train.validation_steps), plan.config.objective)


def write_results(plan: SweepPlan, trials: Sequence[Trial], facts: dict[str, Any]) -> None:
    """leaderboard.csv, best/ and TensorBoard's hparams.

    Args:
        trials: the best first.
        facts: for sweep.json; gets the name of the best trial.
    """
    objective, train = plan.config.objective, plan.train
    write_leaderboard(plan.sweep_dir, trials, objective)
    best = next((trial for trial in trials if weights_of(trial)), None)
    facts["best"] = best.record.name if best else None
    if best:
        write_best(plan.sweep_dir, best, plan.config_of(best.record), facts["versions"])
    if "tensorboard" in train.trackers:
        try:
            for trial in trials:
                write_hparams(plan.sweep_dir / train.logging_dir, trial, objective)
        except OSError:  # nothing of it is lost: the trials' files have all
            logger.warning("TensorBoard's files could not be written", exc_info=True)


def push_best(plan: SweepPlan, best: Trial, facts: Mapping[str, Any]) -> str:
    """Push best/, whose card then names the repository.

    Raises:
        RunError: if that fails; the sweep is finished all the same.
    """
    train, token = plan.train, plan.run.token
    repo_id = export.resolve_repo_id(plan.sweep_dir, train.hub_model_id, token)
    folder = write_best(plan.sweep_dir, best, plan.config_of(best.record), facts["versions"], repo_id)
    assert folder is not None
    return export.push_to_hub(folder, repo_id=repo_id, token=token)
