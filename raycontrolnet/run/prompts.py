"""Long prompts are cut to the tokenizer's maximum length, as in every script; here the user is told."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

logger = logging.getLogger(__name__)

MOST_WARNINGS = 10
_warned: set[str] = set()


def warn_if_cut(tokenizer: CLIPTokenizer, prompt: str) -> None:
    """Log that `prompt` has more tokens than the text encoder reads; once a prompt, and for ten prompts at most."""
    limit = tokenizer.model_max_length
    # A token is at least a character: most prompts need no second look.
    if len(prompt) + 2 <= limit or prompt in _warned or len(_warned) >= MOST_WARNINGS:
        return
    tokens = len(tokenizer(prompt, verbose=False).input_ids)
    if tokens > limit:
        _warned.add(prompt)
        logger.warning("a prompt has %d tokens; those after the first %d do nothing: %r", tokens, limit, prompt)
