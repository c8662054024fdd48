"""The family of the base model that settings name, found from its small files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from raycontrolnet.config.objective_settings import ObjectiveConfig
from raycontrolnet.config.settings import DataConfig, ModelConfig
from raycontrolnet.data.buckets import Buckets, in_words
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.families.registry import (
    class_in,
    denoiser_config,
    denoiser_configs,
    families,
    family_of,
    family_or_first,
)
from raycontrolnet.model.files import SCHEDULER_CONFIG, ModelFiles, NotKnown, NotThere, local_files
from raycontrolnet.model.single_file import NotABase, base_files
from raycontrolnet.text import first_of

OBJECTIVE_SETTINGS = ("snr_gamma", "rescale_betas_zero_snr")
"""Settings of the objective that not every base model can have."""
LEAST_SIDE = 256
"""Pixels of the smallest images that SDXL was trained on, by its authors."""
SIZE_SETTINGS = ("size_conditioning", "crops_coords_top_left_h", "crops_coords_top_left_w")


def config_of_denoiser(model: ModelConfig, token: str | None) -> dict[str, Any]:
    """Return the configuration of the base model's denoiser; empty if this machine cannot look at it."""
    try:
        return denoiser_config(base_files(model, token, denoiser_configs(), from_cache=True))
    except (NotABase, NotKnown, NotThere, OSError):
        return {}


def objective_problems(
    model: ModelConfig, objective: ObjectiveConfig, family: Family | None, token: str | None
) -> Iterator[str]:
    """Yield a problem for each setting of the objective that the base model cannot have, if this machine sees it.

    Args:
        family: of the base model, as `base_family` finds it.
    """
    if family is None or not any(getattr(objective, name) for name in OBJECTIVE_SETTINGS):
        return
    with suppress(NotABase, NotKnown, NotThere, OSError):
        if scheduler := base_files(model, token, (SCHEDULER_CONFIG,), from_cache=True).read_json(SCHEDULER_CONFIG):
            yield from family.objective_problems(objective, scheduler)


def family_in(files: ModelFiles) -> Family:
    """Return the family of a base model by its denoiser, or else its model_index.json; the first if they do not say."""
    if config := denoiser_config(files):
        return family_or_first(config)
    index = files.read_json("model_index.json")
    of_index = (each for each in families() if class_in(index, each.denoiser) in each.part_classes[each.denoiser])
    return next(of_index, families()[0])


def base_family(model: ModelConfig, token: str | None) -> Family | None:
    """Return the family of the base model; None if this machine cannot look at it, or it is of none."""
    config = config_of_denoiser(model, token)
    return family_of(config) if config else None


def family_of_saved(controlnet: Path) -> Family:
    """Return the family of bases that the ControlNet in this folder is for; the first one if its files do not say."""
    return family_or_first(local_files(controlnet).read_json("config.json"))


def resolution_problem(resolution: int, family: Family) -> str | None:
    """Return what is wrong with images of this size for the family; None if nothing is."""
    lower, rest = divmod(resolution, multiple := family.resolution_multiple)
    near = " or ".join(str(number * multiple) for number in (lower, lower + 1) if number)
    return (
        f"--resolution={resolution}: must be divisible by {multiple} for {family.title}; use {near}" if rest else None
    )


def bucket_warning(buckets: Buckets | None, family: Family | None) -> str | None:
    """Return a warning if buckets are smaller than the family was trained on."""
    if buckets is None or family is None or not family.has_size_conditions:
        return None
    small = [in_words(size) for size in buckets.sizes if min(size) < LEAST_SIDE]
    if not small:
        return None
    which = f"aspect buckets with a side below {LEAST_SIDE} pixels ({first_of(small)})"
    return f"{which}: {family.title} was not trained on such images; use a larger --resolution, or square images"


def size_problems(data: DataConfig, family: Family | None) -> Iterator[str]:
    """Yield a problem for each setting of sizes that the family cannot have, or that does nothing beside the others."""
    if family and (problem := resolution_problem(data.resolution, family)):
        yield problem
    given = {name: value for name in SIZE_SETTINGS if (value := getattr(data, name)) != getattr(DataConfig, name)}
    for name, value in given.items():
        if family and not family.has_size_conditions:
            yield f"--{name}={value}: {family.title} is not conditioned on sizes; leave it out"
        elif name != "size_conditioning" and data.size_conditioning == "real":
            yield f"--{name}={value}: with --size_conditioning real, each image has its own; leave out one of the two"
