"""Warnings of prompts that are longer than the tokenizer's maximum, and are cut."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MOST_WARNINGS = 10
_warned: set[str] = set()


def warn_if_cut(tokenizers: Sequence[PreTrainedTokenizerBase], prompt: str) -> None:
    """Log if `prompt` has more tokens than a text encoder reads; once a prompt, for ten prompts at most."""
    if prompt in _warned or len(_warned) >= MOST_WARNINGS:
        return
    if problem := cut(tokenizers, prompt):
        _warned.add(prompt)
        logger.warning("%s", problem)


def cut(tokenizers: Sequence[PreTrainedTokenizerBase], prompt: str) -> str | None:
    """Return a warning if `prompt` has more tokens than a text encoder reads."""
    for tokenizer in tokenizers:
        limit = tokenizer.model_max_length
        if len(prompt) + 2 <= limit:  # a token is at least a character: most prompts need no tokenizing
            continue
        tokens = len(tokenizer(prompt, verbose=False).input_ids)
        if tokens > limit:
            return f"a prompt has {tokens} tokens; those after the first {limit} do nothing: {prompt!r}"
    return None
