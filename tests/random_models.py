"""Models with random weights, by their configurations alone."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.model.components import Components
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.files import ModelFiles
from raycontrolnet.predict.shapes import _models, _noise_scheduler


def built(family: Family, base: ModelFiles, model: ModelConfig, *, dtype: torch.dtype) -> Components:
    """Build the models of a base without tokenizers, the frozen ones in `dtype`."""
    return _models(family, base, model, _noise_scheduler(family, base, model), vae=None, dtype=dtype)


class TextLengths:
    """A tokenizer without files: the tokens of a text are its length."""

    model_max_length = 77

    def __call__(self, texts: Sequence[str], **options: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=torch.tensor([[len(text)] * self.model_max_length for text in texts]))
