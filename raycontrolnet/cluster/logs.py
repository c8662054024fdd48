"""Logs: those of Ray and the libraries go to a file, progress goes to the user."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from raycontrolnet.storage.files import is_closed

STDERR = 2
LOGGERS = (
    "ray", "ray.train", "ray.data", "ray.tune", "raycontrolnet", "diffusers", "transformers", "accelerate",
    "bitsandbytes", "huggingface_hub", "py.warnings",
)  # fmt: skip


@contextmanager
def shown_on(stream: TextIO | None) -> Iterator[TextIO]:
    """Provide a stream for progress: `stream`, or standard error as it is now, which `logging_to` will redirect."""
    if stream not in (None, sys.stderr) or not _has_real_stderr():
        yield stream or sys.stderr
        return
    encoding, errors = sys.stderr.encoding, sys.stderr.errors
    with open(os.dup(STDERR), "w", buffering=1, encoding=encoding, errors=errors) as terminal:  # noqa: PTH123
        yield terminal


def _has_real_stderr() -> bool:
    """Check that standard error is the process's own, not a notebook's or a test's."""
    try:
        return sys.stderr is sys.__stderr__ and sys.stderr.fileno() == STDERR  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Send the process's standard error, including that of Ray's C++ parts, to a file."""
    if not _has_real_stderr():
        yield
        return
    sys.stderr.flush()
    with path.open("ab") as file:
        kept = os.dup(STDERR)
        os.dup2(file.fileno(), STDERR)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, STDERR)
        os.close(kept)


@contextmanager
def logging_to(path: Path, *, of_ray: bool = True) -> Iterator[None]:
    """Send the logs of Ray, the libraries and this package, and Python's warnings, to a file instead of the terminal.

    Args:
        of_ray: False where Ray is not used: it is not imported then.
    """
    with _stderr_to(path):
        if of_ray:
            import ray.data
            import ray.train  # noqa: F401 (they set their loggers up when imported)
        with _loggers_to(path):
            yield


@contextmanager
def _loggers_to(path: Path) -> Iterator[None]:
    """Send what LOGGERS log, and Python's warnings, to a file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(lambda _: not is_closed(path))
    before = {}
    logging.captureWarnings(True)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        before[name] = (logger.handlers[:], logger.propagate, logger.level)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.INFO if name == "raycontrolnet" else logging.WARNING)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for name, (handlers, propagate, level) in before.items():
            logger = logging.getLogger(name)
            logger.handlers[:] = handlers
            logger.propagate = propagate
            logger.setLevel(level)
        handler.close()
