"""The settings of `raycontrolnet generate`, as flags and in Python. Those shared with training have its names."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from raycontrolnet.config.declare import setting
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
    secret_problems,
    seed_problems,
)
from raycontrolnet.config.settings import MIXED_PRECISIONS
from raycontrolnet.config.values import check_settings

MOST_INFERENCE_STEPS = 999
"""Stable Diffusion has 1,000 timesteps, and the scheduler needs one more timestep than steps."""


@dataclass(frozen=True, kw_only=True)
class DrawingConfig:
    """Pictures: the ControlNet, and what it draws."""

    controlnet: str = ""
    """ControlNet: a run's output_dir, a checkpoint-N of it, a ControlNet's folder, or a Hub id. Required."""
    prompt: tuple[str, ...] | None = setting(None, may_be_empty=True)
    """Prompts; as many as control images, or one. Required."""
    image: tuple[str, ...] | None = None
    """Control images of any size and mode, read as in training; as many as prompts, or one. Required."""
    num_images: int = 4
    """Images per prompt-image pair."""
    out: str = "generated"
    """Folder for the images; earlier images with the same names are replaced."""
    control_fidelity: str | None = None
    """Score images by the condition found in them: shape (of a filled outline) or canny (edges)."""

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """(prompt, control image path) of each pair; a single prompt or image is used for all."""
        return pairs_of(self.prompt, self.image)

    def problems(self) -> Problems:
        if not self.controlnet:
            yield "--controlnet: required; a run's output_dir, a checkpoint-N of it, a ControlNet's folder, or a Hub id"
        yield from secret_problems(self, "controlnet")
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
    """Sampling: how images are drawn."""

    seed: int = 0
    """Seed of the images; with a run's seed they are those of its validation."""
    num_inference_steps: int = 20
    """Denoising steps per image, with UniPC."""
    guidance_scale: float | None = None
    """Closeness of images to the prompt; up to 1 there is none. By default the run's, or else 7.5, for SDXL 5."""
    batch_size: int = 1
    """Images drawn at a time; more is faster for small images, and only rounding differs."""
    rescale_betas_zero_snr: bool | None = None
    """Begin at pure noise, for a ControlNet that was trained with that; by default as the run was."""
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
    """Model: the base model."""

    pretrained_model_name_or_path: str | None = None
    """Base model: a folder, Hub id or .safetensors file; by default the one that the run's config.yaml names."""
    pretrained_vae_model_name_or_path: str | None = None
    """VAE instead of the base model's own: a local folder or a Hub id; by default the run's."""
    base_config: str | None = None
    """Model in diffusers' layout that configures a single-file base; by default the run's."""
    revision: str | None = None
    """Revision (branch, tag or commit) of the base model on the Hub; by default the run's."""
    variant: str | None = None
    """File variant of the base model, such as fp16; by default the run's."""
    cache_dir: str | None = None
    """Folder for downloaded models."""
    hub_token: str | None = setting(None, secret=True, may_be_empty=True)
    """Token for private models; HF_TOKEN and `hf auth login` work as well. It is never shown or stored."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(BaseModelConfig, SamplingConfig, DrawingConfig):
    """Settings for drawing images with a ControlNet.

    Raises:
        ConfigError: with every problem at once, each naming the flag, the value and the fix.
    """

    def __post_init__(self) -> None:
        check_settings(self)

    def with_defaults(self, settings: dict[str, Any]) -> GenerateConfig:
        """Return the config with values from `settings` for those that were not given."""
        own = {name: value for name, value in settings.items() if getattr(self, name, ...) is None}
        return dataclasses.replace(self, **own)


GENERATE_GROUPS: tuple[Any, ...] = GenerateConfig.__bases__[::-1]
