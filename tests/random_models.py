"""Models with random weights, by their configurations alone."""

from __future__ import annotations

import torch

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.model.components import Components
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.files import ModelFiles
from raycontrolnet.predict.shapes import _models, _noise_scheduler


def built(family: Family, base: ModelFiles, model: ModelConfig, *, dtype: torch.dtype) -> Components:
    """Build the models of a base without tokenizers, the frozen ones in `dtype`."""
    return _models(family, base, model, _noise_scheduler(family, base, model), vae=None, dtype=dtype)
