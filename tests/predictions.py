"""Predictions of runs on base models that are written as configurations alone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from full_size import write_configurations

from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.records import Size
from raycontrolnet.model.families.registry import family_of
from raycontrolnet.model.files import local_files
from raycontrolnet.predict.prediction import Prediction, predict
from raycontrolnet.predict.shapes import shaped

Base = Path | Mapping[str, Mapping[str, Any]]
"""A base model's folder, or its configurations."""


def predicted(
    base: Base, dtype: torch.dtype, *, cached: bool = True, on_gpu: bool = False, sizes: Sequence[Size] = (),
    **settings: Any,
) -> Prediction:  # fmt: skip
    """Predict a run on `base` with some settings, by default with the layers of a CPU, and of one image size."""
    config = TrainConfig(pretrained_model_name_or_path="random weights", train_data_dir=".", **settings)
    with tempfile.TemporaryDirectory() as folder:
        files = local_files(base if isinstance(base, Path) else write_configurations(base, Path(folder) / "base"))
        family = family_of(files.read_json("unet/config.json"))
        assert family
        with shaped(family, files, config, vae=None, dtype=dtype) as components:
            return predict(components, config, cached=cached, on_gpu=on_gpu, sizes=sizes)
