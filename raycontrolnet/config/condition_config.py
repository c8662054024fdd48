"""The settings of `raycontrolnet condition`, as flags and in Python. Those shared with training have its names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycontrolnet.config.declare import setting
from raycontrolnet.config.rules import (
    Problems,
    at_least,
    folder_problems,
    in_unit_interval,
    one_of,
    path_problem,
    problem_of,
    resolution_problems,
)
from raycontrolnet.config.settings import BAD_SAMPLES
from raycontrolnet.config.values import check_settings

CONDITIONS = ("canny", "blur", "grey")
BLUR_OF_RESOLUTION = 1 / 64


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """Pictures: the images to make conditions of."""

    images: str = ""
    """A folder of pictures, and of folders with more of them. Required."""
    caption: str | None = setting(None, may_be_empty=True)
    """Caption of all pictures without one in metadata.jsonl (or .csv, ...) or in a .txt file of their name."""
    image_column: str = "image"
    """Column of the pictures in metadata.jsonl."""
    caption_column: str = "text"
    """Column of the captions in metadata.jsonl: a string, or a list of strings."""
    out: str | None = None
    """Folder for the conditioning images and their metadata.jsonl; by default `IMAGES-CONDITION`: photos-canny."""
    on_bad_sample: str = "fail"
    """Reaction to pictures that cannot be used: fail (with the list, at the end), or skip them."""
    max_bad_fraction: float = 0.01
    """Largest share of pictures that may be skipped, in [0, 1]."""

    @property
    def folder(self) -> Path:
        """Absolute path of the pictures' folder."""
        return Path(self.images).expanduser().resolve()

    def problems(self) -> Problems:
        if not self.images:
            yield "--images: required; the folder with the pictures"
        elif "://" in self.images:
            yield problem_of(self, "images", "must be a local or mounted folder; copy the pictures to this machine")
        elif problem := path_problem("images", self.images):
            yield problem
        elif self.folder.is_file():
            yield problem_of(self, "images", "is a file; name the folder that it is in")
        elif not self.folder.is_dir():
            yield problem_of(self, "images", "no such folder")
        elif self.out is None and not self.folder.name:
            yield "--out: required, as the pictures' folder has no name"
        if self.out is not None:
            yield from folder_problems(self, "out")
        yield from one_of(self, "on_bad_sample", BAD_SAMPLES)
        yield from in_unit_interval(self, "max_bad_fraction")


@dataclass(frozen=True, kw_only=True)
class ConditionsConfig:
    """Condition: what is made, and how."""

    condition: str = ""
    """canny (edges), blur (for sharpening and super-resolution) or grey (for colouring). Required."""
    resolution: int = 512
    """Pixels of the short side, divisible by 8: as in training, for edges and blur depend on it. Nothing is cropped."""
    canny_low_threshold: int = 100
    """Gradient above which a pixel continues an edge; lower for more edges."""
    canny_high_threshold: int = 200
    """Gradient above which a pixel starts an edge; lower for more edges."""
    blur_radius: float | None = None
    """Standard deviation of the blur, in pixels at `resolution`; by default a 64th of it: 8 at 512."""

    @property
    def options(self) -> tuple[tuple[str, float], ...]:
        """Keyword arguments for the condition's function in conditions/recipes.py."""
        if self.condition == "canny":
            return ("low_threshold", self.canny_low_threshold), ("high_threshold", self.canny_high_threshold)
        if self.condition == "blur":
            radius = self.resolution * BLUR_OF_RESOLUTION if self.blur_radius is None else self.blur_radius
            return (("radius", radius),)
        return ()

    def problems(self) -> Problems:
        if not self.condition:
            yield f"--condition: required; one of {', '.join(CONDITIONS)}"
        else:
            yield from one_of(self, "condition", CONDITIONS)
        yield from resolution_problems(self)
        yield from at_least(self, 0, "canny_low_threshold", "canny_high_threshold")
        if self.canny_high_threshold < self.canny_low_threshold:
            problem = f"must be at least --canny_low_threshold, which is {self.canny_low_threshold}"
            yield problem_of(self, "canny_high_threshold", problem)
        if self.blur_radius is not None and not 0 < self.blur_radius <= self.resolution:
            yield problem_of(self, "blur_radius", f"must be above 0, and at most --resolution, {self.resolution}")


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Ray: the cluster."""

    address: str | None = None
    """Ray cluster to run on (`auto` for the one on this machine); by default RAY_ADDRESS, or else a local Ray."""


@dataclass(frozen=True, kw_only=True)
class ConditionConfig(RayConfig, ConditionsConfig, PicturesConfig):
    """Settings for making conditioning images of pictures.

    Raises:
        ConfigError: with every problem at once, each naming the flag, the value and the fix.
    """

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def out_folder(self) -> Path:
        """Absolute path of the folder for the conditioning images."""
        if self.out is None:
            return self.folder.with_name(f"{self.folder.name}-{self.condition}")
        return Path(self.out).expanduser().resolve()


CONDITION_GROUPS: tuple[Any, ...] = ConditionConfig.__bases__[::-1]
