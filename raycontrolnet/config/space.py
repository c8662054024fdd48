"""The space of a sweep: the settings its trials try, read from YAML or Python, and drawn from.

    learning_rate: {loguniform: [2e-6, 1e-4]}
    lr_scheduler: {choice: [constant, cosine]}
    proportion_empty_prompts: {uniform: [0, 0.5]}
    train_batch_size: {grid: [4, 8]}

`uniform` and `loguniform` draw from a range, ends included; whole numbers for a setting that is one. `choice` draws
from a list. `grid` gives each value of a list to equally many trials. The names are those of the settings.
"""

from __future__ import annotations

import itertools
import math
import random
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from raycontrolnet.config.rules import NO_VALUE
from raycontrolnet.config.sweepable import refusal, takes_values
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.config.values import as_flag, coerce, read_yaml, setting_types, unknown_names
from raycontrolnet.errors import ConfigError
from raycontrolnet.storage.uri import shown_name
from raycontrolnet.text import perhaps

TYPES = setting_types(TrainConfig)
KINDS = ("uniform", "loguniform", "choice", "grid")

DEFAULT_SPACE: Mapping[str, Any] = {
    "learning_rate": {"loguniform": [2e-6, 1e-4]},
    "lr_scheduler": {"choice": ["constant", "cosine"]},
    "proportion_empty_prompts": {"uniform": [0.0, 0.5]},
}
"""Space of a sweep without --space."""


@dataclass(frozen=True)
class Dimension:
    """The values to try of one setting."""

    kind: str
    """One of `KINDS`."""
    values: tuple[Any, ...]
    """(low, high) of a range, both included; else at least one value, all different. Of the setting's type."""
    whole: bool = False
    """True for a range of whole numbers; its ends are as likely as those between."""

    @property
    def is_range(self) -> bool:
        """True for uniform and loguniform, which is even in the logarithm: every factor of 10 is equally likely."""
        return self.kind in ("uniform", "loguniform")

    def at(self, share: float) -> Any:
        """Return the value at `share`, in [0, 1), of the list; of a range, the one with that share of draws below."""
        if not self.is_range:
            return self.values[int(share * len(self.values))]
        margin = 0.5 if self.whole else 0.0  # a whole number covers all numbers that round to it
        is_log = self.kind == "loguniform"
        lowest, highest = self.values
        low, high = (math.log(end) if is_log else end for end in (lowest - margin, highest + margin))
        value = (1 - share) * low + share * high
        value = math.exp(value) if is_log else value
        return min(max(round(value) if self.whole else value, lowest), highest)


Space: TypeAlias = Mapping[str, Dimension]
"""Name of a setting -> the values to try."""


def place_of(space: str | Path | Mapping[str, Any] | None) -> str:
    """Return the place to name in problems of `space`: the flag, with the file's name if there is one."""
    return f"--space={shown_name(str(space))}" if isinstance(space, (str, Path)) else "--space"


def read_space(space: str | Path | Mapping[str, Any] | None) -> dict[str, Dimension]:
    """Return the space of a YAML file or a mapping (see the top of this module); None is the default one.

    `SweepConfig` checks whether its values can be run.

    Raises:
        ConfigError: with every problem at once, each starting with its place.
    """
    if space == "":
        raise ConfigError([f"--space: {NO_VALUE}; name a YAML file, or leave it out for the default space"])
    place = place_of(space)
    entries = read_yaml(space, place) if isinstance(space, (str, Path)) else DEFAULT_SPACE if space is None else space
    if not isinstance(entries, Mapping):
        raise ConfigError([f"{place}: must be a mapping, such as {_EXAMPLE}"])
    if not entries:
        raise ConfigError([f"{place}: names no settings; add some, such as {_EXAMPLE}, or leave out --space"])
    problems = unknown_names(entries, TYPES, place)
    dimensions: dict[str, Dimension] = {}
    for name in [name for name in entries if name in TYPES]:
        try:
            if not takes_values(name):  # the values may be secret
                raise ConfigError([str(refusal(name, ""))])
            dimensions[name] = _dimension(name, entries[name])
        except ConfigError as error:
            problems += [f"{place}: {name}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return dimensions


_EXAMPLE = "learning_rate: {loguniform: [2e-6, 1e-4]}"


def _dimension(name: str, entry: Any) -> Dimension:
    """Return the values to try of the setting `name`, or raise a ConfigError without the place."""
    if isinstance(entry, (list, tuple)):
        raise ConfigError([f"{shown(entry)}: is a list; perhaps you meant {{choice: {shown(entry)}}}"])
    if entry is None:
        raise ConfigError(["no values are given; list them with {choice: [...]}"])
    if not isinstance(entry, Mapping):
        raise ConfigError([f"{entry}: is a single value; give it as a flag: {as_flag(name, entry)}"])
    if len(entry) != 1:
        given = f"{', '.join(map(str, entry))}: are several kinds; keep one" if entry else "{}: names no kind"
        raise ConfigError([f"{given} of {', '.join(KINDS)}"])
    ((kind, values),) = entry.items()
    if kind not in KINDS:
        raise ConfigError([f"{kind}: must be one of {', '.join(KINDS)}{perhaps(str(kind), KINDS)}"])
    return _choice(name, kind, values) if kind in ("choice", "grid") else _uniform(name, kind, values)


def _uniform(name: str, kind: str, values: Any) -> Dimension:
    """Return the range to try, or raise a ConfigError without the place."""
    number = _type_without_none(name)
    if number not in (int, float):
        raise ConfigError([f"{kind}: is for numbers, which {name} is not; list its values with {{choice: [...]}}"])
    given = f"{kind}: {shown(values)}"
    if not isinstance(values, (list, tuple)) or len(values) != 2:
        raise ConfigError([f"{given}: must be two numbers, [low, high]"])
    problems, ends = [], []
    for value in values:
        try:
            ends.append(coerce(value, number))
            if math.isinf(ends[-1]):
                raise ValueError("must be finite")
        except ValueError as error:
            problems.append(f"{given}: {value}: {error}")
    if problems:
        raise ConfigError(problems)
    low, high = ends
    if low == high:
        raise ConfigError([f"{given}: is a single value; give it as a flag: {as_flag(name, low)}"])
    if kind == "loguniform" and min(low, high) <= 0:
        raise ConfigError([f"{given}: low must be above 0, as its logarithm is taken; raise it, or use uniform"])
    if low > high:
        raise ConfigError([f"{given}: low must be below high; perhaps you meant {shown([high, low])}"])
    return Dimension(kind, (low, high), whole=number is int)


def _choice(name: str, kind: str, given: Any) -> Dimension:
    """Return the listed values to try, or raise a ConfigError without the place."""
    if not isinstance(given, (list, tuple)):
        hint = "" if isinstance(given, Mapping) or given is None else f", such as [{given}]"
        raise ConfigError([f"{kind}: {given}: must be a list{hint}"])
    if not given:
        raise ConfigError([f"{kind}: []: is empty; list the values to try"])
    problems: list[str] = []
    values: list[Any] = []
    for value in given:
        try:
            found = coerce(value, TYPES[name])
        except ValueError as error:
            is_word = isinstance(value, bool) and _type_without_none(name) is str
            hint = '; YAML reads no, off, yes and on as true or false: put it in quotes, as in "no"' if is_word else ""
            problems.append(f"{kind}: {value}: {error}{hint}")
            continue
        if found in values:
            problems.append(f"{kind}: {found}: is listed twice; list every value once")
        values.append(found)
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return Dimension(kind, tuple(values))


def _type_without_none(name: str) -> Any:
    """Return the setting's type; for an optional one, that of its values."""
    kind = TYPES[name]
    return next(part for part in typing.get_args(kind) or (kind,) if part is not type(None))


def shown(value: Any) -> str:
    """Return a value or a list of them as YAML has it, but for quotes."""
    return f"[{', '.join(map(shown, value))}]" if isinstance(value, (list, tuple)) else str(value)


def to_grammar(space: Space) -> dict[str, dict[str, list[Any]]]:
    """Return `space` as plain values for JSON and YAML, which `read_space` reads."""
    return {
        name: {dimension.kind: [list(value) if isinstance(value, tuple) else value for value in dimension.values]}
        for name, dimension in space.items()
    }


def combinations(space: Space, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield all combinations of the values, or the ends of the ranges, in the space for `names`."""
    tried = [name for name in names if name in space]
    for values in itertools.product(*(space[name].values for name in tried)):
        yield dict(zip(tried, values, strict=True))


def _grids(space: Space) -> dict[str, tuple[Any, ...]]:
    """Return the values of each grid, sorted by name: the order of a file's lines does not matter."""
    return {name: space[name].values for name in sorted(space) if space[name].kind == "grid"}


def num_trials(space: Space, num_samples: int) -> int:
    """Return the number of trials: `num_samples` of every combination of the grids' values."""
    return num_samples * math.prod(map(len, _grids(space).values()))


def num_combinations(space: Space) -> int | None:
    """Return the number of combinations of the space's values; None if it has a range."""
    if any(dimension.is_range for dimension in space.values()):
        return None
    return math.prod(len(dimension.values) for dimension in space.values())


def draw(space: Space, seed: int, index: int) -> dict[str, Any]:
    """Return the settings of trial `index`, which depend on the arguments alone.

    Trials go through the combinations of the grids in turn (sorted by name, the last changes fastest). Every other
    value is drawn from (seed, index, name), so that more trials or more settings in the space do not change it. If all
    are choices, trials with the settings of an earlier one are drawn anew, until all combinations are there.
    """
    turn, found = num_trials(space, 1), set[tuple[Any, ...]]()
    first = _first_of_turns(space, index)
    for each in range(index if first is None else first, index + 1, turn):
        settings = _new(space, seed, each, found)
    return settings


def draws(space: Space, seed: int, number: int) -> Iterator[dict[str, Any]]:
    """Yield the settings of trials 0 to `number` - 1, as `draw`, in less time."""
    found: dict[int | None, set[tuple[Any, ...]]] = {}
    for index in range(number):
        first = _first_of_turns(space, index)
        yield _new(space, seed, index, set() if first is None else found.setdefault(first, set()))


def _first_of_turns(space: Space, index: int) -> int | None:
    """Return the first trial whose settings trial `index` must not repeat; None if it has none like that."""
    different = num_combinations(space)
    if different is None:
        return None
    turn = num_trials(space, 1)
    return index - index // turn % (different // turn) * turn


def _new(space: Space, seed: int, index: int, found: set[tuple[Any, ...]]) -> dict[str, Any]:
    """Return the first of the draws for trial `index` that is not in `found`, and add it."""
    tries = (_drawn(space, seed, index, number) for number in itertools.count())
    settings = next(settings for settings in tries if tuple(settings.values()) not in found)
    found.add(tuple(settings.values()))
    return settings


def _drawn(space: Space, seed: int, index: int, number: int) -> dict[str, Any]:
    """Return what draw `number` is for trial `index`."""
    grids, key = _grids(space), f"{seed}/{index}/{number}" if number else f"{seed}/{index}"
    of_grids = list(itertools.product(*grids.values()))
    fixed = dict(zip(grids, of_grids[index % len(of_grids)], strict=True))
    drawn = {
        name: fixed[name] if name in fixed else dimension.at(random.Random(f"{key}/{name}").random())
        for name, dimension in space.items()
    }
    return {name: coerce(value, TYPES[name]) for name, value in drawn.items()}


def optuna_distributions(space: Space) -> dict[str, Any]:
    """Return setting name -> optuna distribution over the same values; a grid becomes a choice."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def distribution(dimension: Dimension) -> Any:
        if not dimension.is_range:
            return CategoricalDistribution(dimension.values)
        kind = IntDistribution if dimension.whole else FloatDistribution
        low, high = dimension.values
        return kind(low, high, log=dimension.kind == "loguniform")

    return {name: distribution(dimension) for name, dimension in space.items()}
