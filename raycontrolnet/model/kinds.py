"""Kinds of models that cannot be trained, told from their small JSON files and the names of their weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from raycontrolnet.model.diffusion import PREDICTION_TYPES

BY_INPUT_CHANNELS = {
    3: "a pixel-space model",
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "a model that starts from an image, such as InstructPix2Pix",
    9: "an inpainting model",
}
"""Input channels of the UNet -> kind; 4 are those of the latents alone."""

MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")
"""Middle blocks that diffusers' ControlNetModel can have; the first is the default."""

OTHER_NOISE = ("EDM", "FlowMatch")
"""Beginnings of the schedulers' names for models that take their noise otherwise than DDPM, as Playground v2.5."""

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+?))?(?P<shard>-\d+-of-\d+)?"
    r"(?:\.(?P<old_variant>\w+?))?\.safetensors"
)
PICKLED = (".bin", ".ckpt", ".pt", ".pth")


def kind_of_unet(config: Mapping[str, Any], *, added: str | None = None) -> str | None:
    """Return the kind of the base with this UNet if it is not a text-to-image Stable Diffusion; None if it is.

    Args:
        added: `addition_embed_type` of its family.
    """
    own = config.get("_class_name", "UNet2DConditionModel")
    extra, channels = config.get("addition_embed_type"), config.get("in_channels", 4)
    if own != "UNet2DConditionModel":
        return f"a model with a {own}"
    if extra != added:
        return f"a model of another family (UNet with addition_embed_type {extra})"
    if channels != 4:
        return f"{BY_INPUT_CHANNELS.get(channels, 'a model of another family')} (UNet with {channels} input channels)"
    if config.get("time_cond_proj_dim") is not None:
        return "an LCM-distilled model (UNet with time_cond_proj_dim)"
    for name, kind in (
        ("class_embed_type", "an unCLIP or another model conditioned on more than text"),
        ("num_class_embeds", "a model conditioned on classes"),
        ("encoder_hid_dim_type", "a model of another family"),
    ):
        if config.get(name) is not None:
            return f"{kind} (UNet with {name} {config[name]})"
    if (attention := config.get("attention_type", "default")) != "default":
        return f"a GLIGEN model or one like it (UNet with attention_type {attention})"
    if (block := config.get("mid_block_type", MID_BLOCKS[0])) not in MID_BLOCKS:
        shown = "without a mid block" if block is None else f"with mid_block_type {block}"
        return f"a model whose UNet ControlNets cannot be copied from ({shown})"
    return None


def scheduler_problem(config: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a base of this scheduler_config.json; None if nothing is."""
    if (name := str(config.get("_class_name", ""))).startswith(OTHER_NOISE):
        return f"its scheduler is {name}; only DDPM's noise can be trained"
    predicted = config.get("prediction_type", PREDICTION_TYPES[0])
    if predicted in PREDICTION_TYPES:
        return None
    return f"its scheduler's prediction_type is {predicted!r}; only {' and '.join(PREDICTION_TYPES)} can be trained"


def weights_problem(
    names: Iterable[str], folder: str, variant: str | None, convert: str, *, variant_flag: bool
) -> str | None:
    """Return why the weights in `folder` would not be found; None if they would.

    Args:
        names: files of the model.
        folder: part of the model, or empty.
        variant: of the weights that will be loaded.
        convert: command that makes pickled weights safetensors.
        variant_flag: --variant chooses among these weights.
    """
    prefix, where = (f"{folder}/", f"its {folder}") if folder else ("", "it")
    own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    found = [match for match in map(_WEIGHTS.fullmatch, own) if match]
    if not found:
        if any(name.endswith(".safetensors") for name in own):
            return None  # of another name, which loading the model will tell
        if any(name.endswith(PICKLED) for name in own):
            return f"{where} has only pickled weights; convert them once: {convert}"
        return f"{where} has no weights (.safetensors)"
    variants = {match["variant"] or match["old_variant"] for match in found}
    if variant not in variants:
        others = ", ".join(sorted(other for other in variants if other))
        if variant is not None:
            instead = "leave the flag out" if None in variants else f"there is {others}"
            return f"{where} has no files of the variant {variant}; {instead}"
        advice = f"add --variant {others.partition(', ')[0]}" if variant_flag else "take .VARIANT out of their names"
        return f"{where} has only files of the variant {others}; {advice}"
    return None
