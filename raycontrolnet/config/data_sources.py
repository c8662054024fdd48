"""The sources that a run's data settings name, one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from raycontrolnet.config.rules import Problems
from raycontrolnet.storage.uri import is_uri, shown_uri

COLUMNS = ("image_column", "conditioning_image_column", "caption_column")


@dataclass(frozen=True)
class SourceConfig:
    """One source and its columns: the settings of the same names, as far as they are this source's."""

    train_data_dir: str | None = None
    """One of this and `dataset_name` is given."""
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    image_column: str = "image"
    conditioning_image_column: str = "conditioning_image"
    caption_column: str = "text"

    FLAGS: ClassVar = ("train_data_dir", "dataset_name")
    """Settings that name sources, in the order in which their rows come."""

    @property
    def flag(self) -> str:
        """The setting that names the source."""
        return self.FLAGS[0] if self.train_data_dir is not None else self.FLAGS[1]

    @property
    def name(self) -> str:
        return self.train_data_dir or self.dataset_name or ""

    @property
    def shown(self) -> str:
        """The setting and its value, for messages."""
        return f"--{self.flag}={shown_uri(self.name) if is_uri(self.name) else self.name}"


def named(value: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the texts of a setting with one or several."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def sources_of(data: Any) -> tuple[SourceConfig, ...]:
    """Return the sources of a `DataConfig`: those of --train_data_dir, then those of --dataset_name."""
    sources = [(flag, name) for flag in SourceConfig.FLAGS for name in named(getattr(data, flag))]
    names_of_configs = iter(_for_each(data.dataset_config_name, len(named(data.dataset_name))))
    columns = [_for_each(getattr(data, column), len(sources)) for column in COLUMNS]
    return tuple(
        SourceConfig(
            **{flag: name},
            dataset_config_name=next(names_of_configs) if flag == "dataset_name" else None,
            **dict(zip(COLUMNS, own, strict=True)),
        )
        for (flag, name), own in zip(sources, zip(*columns, strict=True), strict=True)
    )


def _for_each(value: str | tuple[str, ...] | None, number: int) -> list[Any]:
    """Return the value for each of a number of sources."""
    return list(value) if isinstance(value, tuple) else [value] * number


def source_problems(data: Any) -> Problems:
    """Check that some source is named, and that settings with a value for each have as many as there are."""
    number = sum(len(named(getattr(data, flag))) for flag in SourceConfig.FLAGS)
    if not number:
        yield "--train_data_dir, --dataset_name: give one of them (neither is given)"
        return
    for column in COLUMNS:
        yield from _number_problems(data, column, number, "")
    data_sets = len(named(data.dataset_name))
    if data.dataset_config_name is not None and not data_sets:
        yield f"--dataset_config_name={_words(data.dataset_config_name)}: needs --dataset_name"
    elif data.dataset_config_name is not None:
        yield from _number_problems(data, "dataset_config_name", data_sets, " of --dataset_name")
    yield from _weight_problems(data.data_weights, number)


def _number_problems(data: Any, name: str, number: int, of: str) -> Iterator[str]:
    value = getattr(data, name)
    if isinstance(value, tuple) and len(value) != number:
        few = f"{len(value)} for {number} source{'s' * (number != 1)}{of}"
        yield f"--{name}={_words(value)}: {few}; give one for all, or one for each"


def _weight_problems(weights: tuple[float, ...] | None, number: int) -> Problems:
    if weights is None:
        return
    start = f"--data_weights {' '.join(f'{weight:g}' for weight in weights)}"
    if any(not 0 < weight < math.inf for weight in weights):
        yield f"{start}: must be finite numbers above 0; leave out a source that is not to be used"
    if number == 1:
        yield f"{start}: needs several sources, of --train_data_dir or --dataset_name"
    elif len(weights) != number:
        yield f"{start}: {len(weights)} for {number} sources; give one for each, first for --train_data_dir"


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
