"""The size of the ControlNet to be trained, by the headers of the files that it begins as: no weights are read."""

from __future__ import annotations

import math
from pathlib import Path

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.model.single_file import UNET, is_single_file

FP32_BYTES = 4
COPIED = ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")
"""Beginnings of the names of the UNet's weights that a ControlNet has as well."""
COPIED_OF_SINGLE_FILES = tuple(
    f"{UNET}{name}" for name in ("input_blocks.", "middle_block.", "time_embed.", "label_emb.")
)
"""The same in the original layout."""


def controlnet_bytes_at_least(model: ModelConfig) -> int:
    """Return the bytes of the ControlNet in fp32, or somewhat less: without the layers that no UNet has.

    Returns:
        0 if it is not known, as of a model on the Hub, or in another format.
    """
    named = model.controlnet_model_name_or_path
    if not named and is_single_file(base := model.pretrained_model_name_or_path):
        return _weights(Path(base).expanduser(), COPIED_OF_SINGLE_FILES) * FP32_BYTES
    folder = Path(named) if named else Path(model.pretrained_model_name_or_path, "unet")
    variant = f".{model.variant}" if model.variant and not named else ""
    file = folder / f"diffusion_pytorch_model{variant}.safetensors"
    return _weights(file, ("",) if named else COPIED) * FP32_BYTES if file.is_file() else 0


def _weights(file: Path, beginnings: tuple[str, ...]) -> int:
    """Return the number of weights in `file` whose names have one of the `beginnings`; 0 if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as weights:
            names = [name for name in weights.keys() if name.startswith(beginnings)]  # noqa: SIM118 (no mapping)
            return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    except (SafetensorError, OSError):
        return 0
