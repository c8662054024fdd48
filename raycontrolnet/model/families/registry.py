"""The registry of families: the base model's configuration decides which one it is, no flag does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raycontrolnet.model.families.family import Family
from raycontrolnet.model.families.stable_diffusion import STABLE_DIFFUSION
from raycontrolnet.model.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from raycontrolnet.model.files import ModelFiles

FAMILIES: tuple[Family, ...] = (STABLE_DIFFUSION, STABLE_DIFFUSION_XL)
"""Read it through `families`. The first one is taken where the files of a model do not say."""


def families() -> tuple[Family, ...]:
    """Return all families."""
    return FAMILIES


def trained() -> str:
    """Return which bases can be trained, for messages."""
    return f"only {' or '.join(family.title for family in families())} text-to-image bases can be trained"


def denoiser_folders() -> tuple[str, ...]:
    """Return the folders that the denoiser of a base may be in."""
    return tuple(dict.fromkeys(family.denoiser for family in families()))


def denoiser_configs() -> tuple[str, ...]:
    """Return the files that a base may have its denoiser's configuration in."""
    return tuple(f"{folder}/config.json" for folder in denoiser_folders())


def denoiser_config(files: ModelFiles) -> dict[str, Any]:
    """Read the configuration of a base's denoiser, the first that is there; empty if none is."""
    return next((config for name in denoiser_configs() if (config := files.read_json(name))), {})


def controlnet_classes() -> tuple[str, ...]:
    """Return the classes of diffusers that the ControlNets of a family have."""
    return tuple(dict.fromkeys(family.controlnet for family in families()))


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family of the denoiser or ControlNet with this config.json; None if it is of none."""
    cls = config.get("_class_name")
    of_class = [family for family in families() if cls in (family.controlnet, *family.part_classes[family.denoiser])]
    return next((family for family in of_class or families() if family.recognizes(config)), None)


def family_or_first(config: Mapping[str, Any]) -> Family:
    """Return the family of this config.json, as `family_of`; the first one if it is of none."""
    return family_of(config) or families()[0]


def denoiser_problem(config: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a base whose denoiser has this config.json: its kind; None if nothing is."""
    kind = family_or_first(config).kind_of_other(config)
    return f"is {kind}; {trained()}" if kind else None


def class_in(index: Mapping[str, Any], part: str) -> Any:
    """Return the class that a model_index.json has for a part; None if it has none."""
    given = index.get(part)
    return given[1] if isinstance(given, list) and len(given) == 2 else None


def pipeline_problem(index: Mapping[str, Any], family: Family) -> str | None:
    """Return what is wrong with a base of this model_index.json: another kind of pipeline; None if nothing is."""
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        return None
    for part, classes in family.part_classes.items():
        found = class_in(index, part)
        if found is None and part != family.denoiser:
            return f"has no {part}, which {family.title} needs; complete it, or name another base model"
        if found not in classes:
            return f"is a {pipeline} (its {part}: {found or 'none'}); {trained()}"
    return None
