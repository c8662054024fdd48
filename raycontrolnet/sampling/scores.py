"""The control fidelity of drawn images: of each, on average, and in words. `fidelity.py` measures it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from PIL import Image

from raycontrolnet.text import decimals, one_line, plus_minus

if TYPE_CHECKING:
    from raycontrolnet.sampling.fidelity import Measure

logger = logging.getLogger(__name__)


class Fidelity(NamedTuple):
    """The control fidelity of several images."""

    mean: float
    error: float
    """Standard error of the mean, from the spread of the images; nan with a single one."""


def score(control: Image.Image, pictures: Sequence[Image.Image], measure: str | None) -> list[float | None]:
    """Measure the control fidelity of each of `pictures`; None without a measure.

    A failure is logged and gives None: the pictures are worth more than their scores.

    Args:
        control: RGB.
        pictures: RGB, of the size of `control`.
        measure: of `control_fidelity`.
    """
    if measure is None:
        return [None] * len(pictures)
    try:
        from raycontrolnet.sampling.fidelity import control_fidelity  # imports OpenCV, which others do not need

        asked = np.asarray(control)
        return [control_fidelity(asked, np.asarray(picture), cast("Measure", measure)) for picture in pictures]
    except Exception as error:
        logger.warning("no control fidelity (%s)", one_line(error))
        logger.debug("traceback of the failed measurement", exc_info=error)
        return [None] * len(pictures)


def average(scores: Iterable[float]) -> Fidelity | None:
    """Return the mean of `scores` and its standard error; None if there are none."""
    values = np.array(list(scores), dtype=np.float64)
    if not values.size:
        return None
    error = float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else math.nan
    return Fidelity(float(values.mean()), error)


def in_words(fidelity: Fidelity) -> str:
    """Describe `fidelity` for a log."""
    return f"control fidelity {decimals(fidelity.mean, 3)}{plus_minus(fidelity.error)}"
