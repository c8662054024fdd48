"""The place in the code where a thread is, in a few words for users: for a worker that hangs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

PACKAGE = Path(__file__).parents[1]
COLLECTIVES = ("/torch/distributed/", "/ray/train/")
"""Parts of the paths of code that is called by all workers together, and waits for all."""


WAITING = ("signals.py", "training/background.py")
"""Files of this package that wait for what others do: the call that waits there says more."""


def whereabouts(thread_id: int) -> str:
    """Return where the thread is, as "waiting in a collective (all_reduce)"; empty if nothing tells.

    The innermost call that says something counts: of a collective, of the backward pass, of this package, or of a wait
    for another thread, which is named with its own whereabouts.
    """
    return next(filter(None, map(_said, _calls(thread_id))), "")


def _calls(thread_id: int) -> Iterator[FrameType]:
    """Yield the thread's calls, from the innermost on."""
    # Private, but the only way; `faulthandler`, which is public, can only write.
    frame = sys._current_frames().get(thread_id)
    while frame:
        yield frame
        frame = frame.f_back


def _said(call: FrameType) -> str | None:
    file, name = Path(call.f_code.co_filename), call.f_code.co_name
    if file.is_relative_to(PACKAGE):  # before the others: it may lie in any folder
        shown = file.relative_to(PACKAGE).as_posix()
        says_nothing = shown in WAITING or name.startswith("<")  # as <lambda>
        return None if says_nothing else f"in {name} of {shown}"
    if any(part in file.as_posix() for part in COLLECTIVES):
        return f"waiting in a collective ({name})"
    if name == "_engine_run_backward":  # Python sees no deeper
        return "in the backward pass, in which gradients are exchanged"
    if call.f_code is threading.Thread.join.__code__:
        return _waiting_for(call.f_locals["self"])
    return None


def _waiting_for(thread: threading.Thread) -> str:
    where = whereabouts(thread.ident or 0)
    return f'waiting for the thread "{thread.name}"{where and f", which is {where}"}'
