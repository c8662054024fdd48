"""Libraries kept quiet: their progress bars, and advice meant for people who call them directly."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module

MODEL_LIBRARIES = ("diffusers", "transformers")

KNOWN_WARNINGS = (
    "__array__ implementation",  # diffusers 0.42's UniPC hands numpy >= 2 a torch tensor without `copy=`
    "Use 'content=",  # huggingface_hub 2.4 uploads with an argument that its HTTP library has renamed
)


@contextmanager
def no_progress_bars(*libraries: str) -> Iterator[None]:
    """Turn off the progress bars of `libraries`, and on again those that were on.

    Args:
        libraries: `diffusers`, `transformers` or `huggingface_hub`, which are imported here.
    """
    with ExitStack() as undo:
        for name in libraries:
            if name == "huggingface_hub":
                _turn_off_uploads(undo)
            else:
                bars = import_module(f"{name}.utils.logging")
                if bars.is_progress_bar_enabled():
                    bars.disable_progress_bar()
                    undo.callback(bars.enable_progress_bar)
        yield


def _turn_off_uploads(undo: ExitStack) -> None:
    from huggingface_hub import constants

    utils = import_module("huggingface_hub.utils")
    # A setting of the user's stands: changing it would be warned about.
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not utils.are_progress_bars_disabled():
        utils.disable_progress_bars()
        undo.callback(utils.enable_progress_bars)


@contextmanager
def no_messages(library: str) -> Iterator[None]:
    """Let `library` log nothing, where its errors are raised and explained as well."""
    logger = logging.getLogger(library)
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def only_errors() -> Iterator[None]:
    """Let diffusers and transformers log errors only, and ignore the warnings in `KNOWN_WARNINGS`."""
    loggers = [logging.getLogger(name) for name in MODEL_LIBRARIES]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message=message, category=DeprecationWarning)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
