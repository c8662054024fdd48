"""The settings of `raycontrolnet generate`: of flags and of Python, under the same names as the training's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from raycontrolnet.config.output_settings import FIDELITY_MEASURES
from raycontrolnet.config.rules import (
    Problems,
    at_least,
    folder_problems,
    guidance_problems,
    one_of,
    pair_problems,
    pairs_of,
    problem_of,
    resolution_problems,
    seed_problems,
)
from raycontrolnet.config.settings import MIXED_PRECISIONS
from raycontrolnet.config.train_config import check_settings

MOST_INFERENCE_STEPS = 999
"""Stable Diffusion has 1,000 timesteps; the scheduler needs one more of them than steps."""


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """Pictures"""

    controlnet: str = ""
    """What to draw with: a run's output_dir, a checkpoint-N of it, a ControlNet's folder, or a Hub id. Required."""
    prompt: tuple[str, ...] | None = None
    """Prompts; as many as control images, or one. Required."""
    image: tuple[str, ...] | None = None
    """Control images of any size and mode, read as in training; as many as prompts, or one. Required."""
    num_images: int = 4
    """Images per prompt-image pair."""
    out: str = "generated"
    """Folder for the images; those of the same names from an earlier time are replaced."""
    control_fidelity: str | None = None
    """Score images by the condition found in them: shape (of a filled outline) or canny (edges)."""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(prompt, control image path) of each pair; a single prompt or image is reused."""
        return pairs_of(self.prompt, self.image)

    def problems(self) -> Problems:
        if not self.controlnet:
            yield "--controlnet: required; a run's output_dir, a checkpoint-N of it, a ControlNet's folder, or a Hub id"
        if not self.prompt:
            yield "--prompt: required; one for every control image, or one for all"
        if not self.image:
            yield "--image: required; a control image for every prompt, or one for all"
        yield from pair_problems(self, "prompt", "image")
        yield from at_least(self, 1, "num_images")
        yield from folder_problems(self, "out")
        yield from one_of(self, "control_fidelity", FIDELITY_MEASURES)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling"""

    seed: int = 0
    """The same seed gives the same images; that of the run gives those of its validation."""
    num_inference_steps: int = 20
    """Denoising steps per image, with UniPC."""
    guidance_scale: float | None = None
    """How closely images follow the prompt; 1 and less is without guidance. By default the run's, or else 7.5."""
    batch_size: int = 1
    """Images drawn at a time: faster for small ones, and the same but for rounding."""
    resolution: int | None = None
    """Pixels of the images' sides, divisible by 8; by default the run's, or else 512."""
    mixed_precision: str | None = None
    """no, fp16 or bf16; by default the run's."""
    use_gpu: bool | None = None
    """Draw on the GPU; by default if there is one."""

    def problems(self) -> Problems:
        yield from seed_problems(self)
        yield from at_least(self, 1, "num_inference_steps", "batch_size")
        if self.num_inference_steps > MOST_INFERENCE_STEPS:
            yield problem_of(self, "num_inference_steps", f"must be at most {MOST_INFERENCE_STEPS}")
        yield from guidance_problems(self)
        yield from resolution_problems(self)
        yield from one_of(self, "mixed_precision", MIXED_PRECISIONS)


@dataclass(frozen=True, kw_only=True)
class BaseModelConfig:
    """Model"""

    pretrained_model_name_or_path: str | None = None
    """Base model: a local folder or a Hub id; by default the one that the run's config.yaml names."""
    revision: str | None = None
    """Revision (branch, tag or commit) of the base model on the Hub; by default the run's."""
    variant: str | None = None
    """File variant of the base model, such as fp16; by default the run's."""
    cache_dir: str | None = None
    """Where downloaded models go."""
    hub_token: str | None = field(default=None, repr=False, metadata={"secret": True})
    """Token for private models; HF_TOKEN and `hf auth login` work as well. Shown and stored nowhere."""

    def problems(self) -> Problems:
        return iter(())


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(BaseModelConfig, SamplingConfig, PicturesConfig):
    """What to draw, with which ControlNet, and how.

    Raises:
        ConfigError: with every problem at once, each naming the flag, the value and the fix.
    """

    def __post_init__(self) -> None:
        check_settings(self, GENERATE_GROUPS)

    def with_defaults(self, settings: dict[str, Any]) -> GenerateConfig:
        """With those of `settings` that were not given."""
        own = {name: value for name, value in settings.items() if getattr(self, name, ...) is None}
        return dataclasses.replace(self, **own)


GENERATE_GROUPS: tuple[Any, ...] = GenerateConfig.__bases__[::-1]
