"""The registry of families: the base model's configuration decides which one it is, no flag does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raycontrolnet.model.families.family import Family
from raycontrolnet.model.families.stable_diffusion import STABLE_DIFFUSION
from raycontrolnet.model.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from raycontrolnet.model.kinds import kind_of_unet

FAMILIES: tuple[Family, ...] = (STABLE_DIFFUSION, STABLE_DIFFUSION_XL)

TRAINED = f"only {' or '.join(family.title for family in FAMILIES)} text-to-image bases can be trained"


def family_of(config: Mapping[str, Any]) -> Family | None:
    """Return the family of the denoiser or ControlNet with this config.json; None if it is of none."""
    return next((family for family in FAMILIES if family.recognizes(config)), None)


def denoiser_problem(config: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a base whose UNet has this config.json: its kind; None if nothing is."""
    family = family_of(config)
    kind = family.kind_of_other(config) if family else kind_of_unet(config)
    return f"is {kind}; {TRAINED}" if kind else None


def pipeline_problem(index: Mapping[str, Any], family: Family = FAMILIES[0]) -> str | None:
    """Return what is wrong with a base of this model_index.json: another kind of pipeline; None if nothing is."""
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        return None
    for part, classes in family.part_classes.items():
        given = index.get(part)
        found = given[1] if isinstance(given, list) and len(given) == 2 else None
        if found is None and part != "unet":
            return f"has no {part}, which {family.title} needs; complete it, or name another base model"
        if found not in classes:
            return f"is a {pipeline} (its {part}: {found or 'none'}); {TRAINED}"
    return None
