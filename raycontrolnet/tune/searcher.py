"""Which settings the next trial tries: Ray Tune's searcher of a sweep.

First come the trials that an earlier part of the sweep has begun, with the settings on record, those that have ended
before the others: they tell again what they found, and nothing of theirs is trained again. Then come new ones: the
settings of trial k are a function of (space, seed, k) alone, or Optuna's proposal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher

from raycontrolnet.config.space import Space, draw, optuna_distributions
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.config.values import coerce, setting_types
from raycontrolnet.tune.recorder import NotPickled
from raycontrolnet.tune.records import TrialRecord

if TYPE_CHECKING:
    from ray.tune.search.optuna import OptunaSearch


class TrialSearcher(NotPickled, Searcher):
    """Proposes trials: their records as mappings, after `propose` was given them.

    Args:
        begun: trials of an earlier part of the sweep, in the order in which they are to go on.
        indices: of the new trials.
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
                self._optuna.suggest(trial_id)  # the same settings, which it was given to begin with
        elif (index := next(self._indices, None)) is not None:
            record = TrialRecord(index, self._settings_of(index, trial_id))
        else:
            return Searcher.FINISHED
        self._propose(record)
        return asdict(record)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self._optuna and self._optuna.metric in result:
            self._optuna.on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if self._optuna:
            self._optuna.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' folders are the record."""

    def restore(self, checkpoint_path: str) -> None:
        """As `save`."""


def proposals(
    space: Space,
    begun: Sequence[TrialRecord],
    propose: Callable[[TrialRecord], None],
    *,
    indices: Sequence[int],
    searcher: str,
    seed: int,
    objective: str,
    mode: str,
) -> TrialSearcher:
    """The searcher `searcher`: random or optuna."""
    if searcher == "random":
        return TrialSearcher(begun, indices, lambda index, _: draw(space, seed, index), propose)
    from ray.tune.search.optuna import OptunaSearch

    optuna = OptunaSearch(
        optuna_distributions(space),
        metric=objective,
        mode=mode,
        seed=(seed + len(begun)) % 2**32,  # the trials that have begun draw nothing: it would propose the same again
        points_to_evaluate=[dict(record.settings) for record in begun],
    )

    def ask(_: int, trial_id: str) -> dict[str, Any]:
        proposed = optuna.suggest(trial_id)
        assert proposed is not None
        return {name: coerce(value, setting_types(TrainConfig)[name]) for name, value in proposed.items()}

    return TrialSearcher(begun, indices, ask, propose, optuna)
