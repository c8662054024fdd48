"""The place in the code where a thread is, in a few words for users: for a worker that hangs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

PACKAGE = Path(__file__).parents[1]
COLLECTIVES = ("/torch/distributed/", "/ray/train/")
"""Parts of the paths of code that is called by all workers together, and waits for all."""


def whereabouts(thread_id: int) -> str:
    """Return where the thread is, as "waiting in a collective (all_reduce)"; empty if nothing tells.

    The innermost call that says something counts: of a collective, of the backward pass, of this package.
    """
    return next(filter(None, map(_said, _calls(thread_id))), "")


def _calls(thread_id: int) -> Iterator[CodeType]:
    """Yield the code of the thread's calls, from the innermost on."""
    # Private, but the only way; `faulthandler`, which is public, can only write.
    frame = sys._current_frames().get(thread_id)
    while frame:
        yield frame.f_code
        frame = frame.f_back


def _said(code: CodeType) -> str | None:
    file = Path(code.co_filename)
    if file.is_relative_to(PACKAGE):  # before the others: it may lie in any folder
        return f"in {code.co_name} of {file.relative_to(PACKAGE).as_posix()}"
    if any(part in file.as_posix() for part in COLLECTIVES):
        return f"waiting in a collective ({code.co_name})"
    if code.co_name == "_engine_run_backward":  # Python sees no deeper
        return "in the backward pass, in which gradients are exchanged"
    return None
