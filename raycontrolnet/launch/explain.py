"""How a run ends before its end: one paragraph that says why, what stands, and how to go on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from raycontrolnet.errors import Interrupted, RunError, UserError, root_cause
from raycontrolnet.launch.preflight import CheckedRun
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.text import one_line
from raycontrolnet.training.failures import read_failure
from raycontrolnet.training.job import LOG, end

logger = logging.getLogger(__name__)


@contextmanager
def interruption_explained(run: CheckedRun) -> Iterator[None]:
    """Ctrl-C, wherever it comes: what stands, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"Interrupted. {_how_to_go_on(run)}") from None


@contextmanager
def failures_explained(run: CheckedRun) -> Iterator[None]:
    """Turn whatever ends a run early into one paragraph that says what stands and how to go on."""
    try:
        yield
    except Exception as error:
        logger.exception("the run failed")
        cause = root_cause(error)
        known = read_failure(run.output_dir) or (cause if isinstance(cause, (UserError, RunError)) else None)
        message = str(known) if known else f"The run failed: {one_line(cause)}."
        kind = UserError if isinstance(known, UserError) else RunError
        raise kind(f"{message}\n{_how_to_go_on(run)} Details: {run.output_dir / LOG}") from error
    finally:
        end(run.output_dir)


def _how_to_go_on(run: CheckedRun) -> str:
    last = run.last_checkpoint()
    if last is None:
        return "There was no checkpoint yet."
    newest = checkpoints.latest(run.output_dir)
    if last.path.parent != run.output_dir:
        name = str(last.path)
    else:
        name = "latest" if newest and newest.path == last.path else last.path.name
    return (
        f"The checkpoint of update {last.step} stands: go on with --resume_from_checkpoint {name} "
        f"(--output_dir {run.output_dir})."
    )
