"""The layout of a base model that is a single file, as a family names it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Files of a family in the original layout."""

    text_weights: tuple[str, ...]
    """Name of a weight of each text encoder, by which diffusers knows it."""
    configured_as: str
    """Hub id of the model whose configuration such files have."""
