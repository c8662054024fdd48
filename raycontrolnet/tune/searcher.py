"""Ray Tune's searcher of a sweep: proposes the settings of the next trial.

First it proposes the trials of an earlier part of the sweep with their recorded settings, ended ones before the others:
these report again what they found. Then come new trials: the settings of trial k are a function of (space, seed, k)
alone, or Optuna's proposal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher

from raycontrolnet.config.space import draw, optuna_distributions
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.config.values import coerce, setting_types
from raycontrolnet.tune.plan import SweepPlan
from raycontrolnet.tune.recorder import NotPickled
from raycontrolnet.tune.records import TrialRecord
from raycontrolnet.tune.trial import trial_config

if TYPE_CHECKING:
    from ray.tune.search.optuna import OptunaSearch


class TrialSearcher(NotPickled, Searcher):
    """Proposes trials as configs for Tune, after it has called `propose` with their records.

    Args:
        begun: trials of an earlier part of the sweep, in the order in which they continue.
        indices: indices of the new trials.
    """

    def __init__(
        self,
        begun: Sequence[TrialRecord],
        indices: Sequence[int],
        settings_of: Callable[[int, str], dict[str, Any]],
        propose: Callable[[TrialRecord], None],
        optuna: OptunaSearch | None = None,
    ):
        super().__init__()
        self._begun, self._indices = list(begun), iter(indices)
        self._settings_of, self._propose, self._optuna = settings_of, propose, optuna

    def suggest(self, trial_id: str) -> Any:
        if self._begun:
            record = self._begun.pop(0)
            if self._optuna:
                self._optuna.suggest(trial_id)  # the same settings, from its points_to_evaluate
        elif (index := next(self._indices, None)) is not None:
            record = TrialRecord(index, self._settings_of(index, trial_id))
        else:
            return Searcher.FINISHED
        self._propose(record)
        return trial_config(record)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self._optuna and self._optuna.metric in result:
            self._optuna.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self._optuna:
            self._optuna.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the trials' folders are the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Read nothing: see `save`."""


def searcher_of(plan: SweepPlan, propose: Callable[[TrialRecord], None]) -> TrialSearcher:
    """Return the searcher of a sweep, which calls `propose` with the record of every trial that it proposes."""
    space, seed, begun = plan.space, plan.train.seed, plan.begun
    assert seed is not None
    if plan.config.searcher == "random":
        return TrialSearcher(begun, plan.new_indices, lambda index, _: draw(space, seed, index), propose)
    from ray.tune.search.optuna import OptunaSearch

    optuna = OptunaSearch(
        optuna_distributions(space),
        metric=plan.config.objective,
        mode=plan.mode,
        seed=(seed + len(begun)) % 2**32,  # else it would draw the same again: begun trials draw nothing
        points_to_evaluate=[dict(record.settings) for record in begun],
    )

    def ask(_: int, trial_id: str) -> dict[str, Any]:
        proposed = optuna.suggest(trial_id)
        assert proposed is not None
        return {name: coerce(value, setting_types(TrainConfig)[name]) for name, value in proposed.items()}

    return TrialSearcher(begun, plan.new_indices, ask, propose, optuna)
