"""The samples of several sources in given shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from raycontrolnet.config.data_sources import sources_of
from raycontrolnet.config.settings import DataConfig
from raycontrolnet.data.buckets import Buckets
from raycontrolnet.data.interleaved import grouped
from raycontrolnet.data.joined_source import named_sources
from raycontrolnet.data.order import Rows, RowSequence, Shuffled
from raycontrolnet.data.source import Source
from raycontrolnet.text import counted

Arrange = Callable[[Rows | int], RowSequence]


def arrangement(
    source: Source,
    weights: Sequence[float] | None,
    seed: int,
    buckets: Buckets | None = None,
    batch_size: int = 1,
) -> Arrange | None:
    """Return what gives rows the order in which samples are of each named source as often as its weight says.

    An epoch has as many samples as there are rows, whatever the weights; each source goes through its own rows evenly.
    A source of which no row is left counts as not there.

    Args:
        weights: above 0, one for each source; None for the order of all rows as one.
        buckets: aspect buckets, of which every `batch_size` samples are of one; the sources are mixed in each.
    """
    if weights is None and buckets is None:
        return None
    labels, exact = labels_of(source), [Fraction(str(weight)) for weight in weights or ()]

    def arrange(rows: Rows | int) -> RowSequence:
        own_labels = labels[:rows] if isinstance(rows, int) else labels[rows]
        counts: list[int] = np.bincount(own_labels, minlength=len(exact)).tolist()
        whole = sum((weight for weight, count in zip(exact, counts, strict=False) if count), Fraction(0))

        def of_source(own: Rows | int, key: tuple[int, ...]) -> RowSequence:
            label = int(labels[0 if isinstance(own, int) else own[0]])
            repeats = exact[label] / whole * sum(counts) / counts[label] if exact else Fraction(1)
            return Shuffled(own, seed, key, repeats)

        def of_bucket(own: Rows | int, key: tuple[int, ...]) -> RowSequence:
            return grouped(own, labels if exact else None, seed, key=key, part=of_source)

        return grouped(rows, buckets.of_row if buckets else None, seed, turn=batch_size, part=of_bucket)

    return arrange


def labels_of(source: Source) -> NDArray[np.int16]:
    """Return the index of each row's named source, int16 [rows]."""
    sizes = [len(part) for part in named_sources(source)]
    return np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)


def in_words(source: Source, data: DataConfig) -> str | None:
    """Return the rows of each of several sources, and the share of samples that are of them; None for one source."""
    parts, configs = named_sources(source), sources_of(data)
    if len(parts) == 1:
        return None
    weights: Sequence[float] = data.data_weights or [len(part) for part in parts]
    named = zip(configs, parts, weights, strict=True)
    return "; ".join(
        f"{config.shown} has {counted(len(part), 'row')}, {weight / sum(weights):.3g} of the samples"
        for config, part, weight in named
    )
