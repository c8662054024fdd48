"""Failures that end a run, recorded by a worker for the driver and for Ray's next try."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from raycontrolnet.errors import DataError, RunError, UserError
from raycontrolnet.model.performance import memory_advised
from raycontrolnet.storage.files import check_open, is_closed

FAILURE_FILE = ".failure.json"
HANG_FILE = ".hang"


def record_failure(output_dir: Path, error: UserError | RunError) -> None:
    """Record a failure that would come again, for the driver and for Ray's next try; the first one stands."""
    if is_closed(output_dir):  # it is another run's by now
        return
    record = {"kind": "user" if isinstance(error, UserError) else "run", "message": str(error)}
    partial = output_dir / f"{FAILURE_FILE}.{uuid.uuid4().hex}"
    partial.write_text(json.dumps(record))
    with suppress(FileExistsError):
        os.link(partial, output_dir / FAILURE_FILE)  # whole at once, and never over another
    partial.unlink()


def read_failure(output_dir: Path) -> UserError | RunError | None:
    """Return the failure that a worker recorded, if any."""
    try:
        record = json.loads((output_dir / FAILURE_FILE).read_text())
    except FileNotFoundError:
        return None
    return (UserError if record["kind"] == "user" else RunError)(record["message"])


def record_hang(output_dir: Path, message: str) -> None:
    """Record why a worker ends its process, in case that it is not started again."""
    with suppress(OSError):  # storage that hangs
        check_open(output_dir)
        (output_dir / HANG_FILE).write_text(message)


def read_hang(output_dir: Path) -> RunError | None:
    """Return why a worker ended its process last, if one did."""
    with suppress(OSError):
        return RunError((output_dir / HANG_FILE).read_text())
    return None


@contextmanager
def failures_recorded(output_dir: Path, memory_advice: Callable[[], str] | None = None) -> Iterator[None]:
    """Record failures that would come again, so that Ray's next try ends at once instead of repeating them.

    Args:
        memory_advice: returns what to do if a GPU's memory is full; None where none is used.
    """
    try:
        with memory_advised(memory_advice) if memory_advice else nullcontext():
            yield
    except (UserError, RunError) as error:
        record_failure(output_dir, error)
        raise


@contextmanager
def bad_samples_advised(*, cached: bool) -> Iterator[None]:
    """Say what helps against images that cannot be used: from pixels each is found alone, when its turn comes."""
    try:
        yield
    except DataError as error:
        if cached:
            raise
        advice = "--cache_latents on names all such images before training, and --on_bad_sample skip leaves them out"
        raise DataError(f"{error}\nfix the data; {advice}") from error


@contextmanager
def retried_if_continued(*, continued: bool) -> Iterator[None]:
    """Take a model that cannot be read for a passing fault, if the run has read it before."""
    try:
        yield
    except UserError as error:
        if continued:
            raise ConnectionError(str(error)) from error
        raise
