"""Captions that a mirrored image contradicts: those that speak of left or right."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

from raycontrolnet.data.source import Source
from raycontrolnet.errors import UserError

logger = logging.getLogger(__name__)

MOST_CAPTIONS = 1024
MOST_REMOTE_CAPTIONS = 128
"""Rows whose captions are looked at; each may be a request."""
_ROWS_AT_A_TIME = 32
_SIDES = re.compile(r"\b(left|right)(most|wards?)?\b", re.IGNORECASE)


def side_warning(source: Source) -> str | None:
    """Return a warning if captions speak of left or right, with their number; None if none of those looked at does."""
    try:
        captions = list(_captions(source, MOST_REMOTE_CAPTIONS if source.remote else MOST_CAPTIONS))
    except (OSError, UserError):  # no reason to end a run, which may have all it needs in its cache
        logger.warning("--random_flip: the captions cannot be looked at", exc_info=True)
        return None
    found = [caption for caption in captions if _SIDES.search(caption)]
    if not found:
        return None
    shown = found[0] if len(found[0]) <= 80 else f"{found[0][:77]}..."
    return (
        f"warning: --random_flip: {len(found):,} of {len(captions):,} captions looked at speak of left or right, which "
        f"a mirrored image contradicts: {shown!r}"
    )


def _captions(source: Source, most: int) -> Iterator[str]:
    """Yield the captions of rows from all parts of the source, without reading images."""
    step = max(1, len(source) // (most // _ROWS_AT_A_TIME)) if len(source) > most else _ROWS_AT_A_TIME
    for start in range(0, len(source), step):
        for identity in source.identities(range(start, min(start + _ROWS_AT_A_TIME, len(source)))):
            captions = json.loads(identity)[-1]
            for caption in [captions] if isinstance(captions, str) else captions or []:
                yield caption or ""
