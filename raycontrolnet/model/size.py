"""The size of the ControlNet to be trained, by the headers of the files that it begins as: no weights are read."""

from __future__ import annotations

import math
from pathlib import Path

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.model.base_family import family_in
from raycontrolnet.model.families.registry import families
from raycontrolnet.model.files import local_files
from raycontrolnet.model.single_file import is_single_file

FP32_BYTES = 4


def controlnet_bytes_at_least(model: ModelConfig) -> int:
    """Return the bytes of the ControlNet in fp32, or somewhat less: without the layers that no base model has.

    Returns:
        0 if it is not known, as of a model on the Hub, or in another format.
    """
    named = model.controlnet_model_name_or_path
    base = model.pretrained_model_name_or_path
    if not named and is_single_file(base):
        copied = {name for family in families() for name in family.copied_of_files}
        return _weights(Path(base).expanduser(), tuple(copied)) * FP32_BYTES
    family = family_in(local_files(Path(base)))
    folder = Path(named) if named else Path(base, family.denoiser)
    variant = f".{model.variant}" if model.variant and not named else ""
    file = folder / f"diffusion_pytorch_model{variant}.safetensors"
    return _weights(file, ("",) if named else family.copied) * FP32_BYTES if file.is_file() else 0


def _weights(file: Path, beginnings: tuple[str, ...]) -> int:
    """Return the number of weights in `file` whose names have one of the `beginnings`; 0 if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as weights:
            names = [name for name in weights.keys() if name.startswith(beginnings)]  # noqa: SIM118 (no mapping)
            return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    except (SafetensorError, OSError):
        return 0
