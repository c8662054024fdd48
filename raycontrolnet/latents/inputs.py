"""The inputs of a run, base model and data: looked at before weights and images are read, all problems at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from raycontrolnet.config.checks import collected
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.source import Source
from raycontrolnet.data.sources import open_source
from raycontrolnet.errors import ConfigError
from raycontrolnet.model.base_family import base_family, objective_problems, size_problems
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.problems import model_problems


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run."""

    source: Source
    family: Family | None
    """The base model's; None if this machine cannot look at it."""


def check_inputs(
    config: TrainConfig,
    token: str | None,
    problems: Iterable[str] = (),
    *,
    elsewhere: bool = False,
    skip_bad: bool = False,
    of_start: Iterable[str] = (),
) -> Inputs:
    """Open the data, and look at the files of the models.

    Args:
        config: all settings.
        token: for private models and data on the Hub.
        problems: those of other settings, told after those of the models.
        elsewhere: other machines load the models, and may reach the Hub where this one does not.
        skip_bad: rows that cannot be used are left out.
        of_start: problems of the checkpoint to go on from; drawn only if there are no others so far.

    Raises:
        ConfigError: with all problems together.
    """
    found, source = [*model_problems(config, token, elsewhere=elsewhere), *problems], None
    with collected(found):
        source = open_source(config, cache_dir=config.cache_dir, token=token, skip_bad=skip_bad)
    if not found:
        found += of_start
    family = base_family(config, token) if not found else None
    found += size_problems(config, family)
    found += objective_problems(config, config, family, token)
    if found or source is None:
        raise ConfigError(found)
    return Inputs(source, family)
