"""The settings of what a run leaves: output, validation and Hub. Declared as in settings.py."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from raycontrolnet.config.rules import (
    Problems,
    at_least,
    folder_problems,
    guidance_problems,
    one_of,
    pair_problems,
    pairs_of,
    problem_of,
)

TRACKERS = ("tensorboard", "wandb", "comet_ml")
FIDELITY_MEASURES = ("shape", "canny")
HELD_OUT_ROWS = 16
"""Rows held out by default: measuring them every 100 updates of batch 4 costs a few percent."""
ROWS_TO_SPARE = 320
"""A data set of this many can spare them."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Output"""

    output_dir: str = "controlnet-model"
    """Folder for everything the run writes."""
    checkpointing_steps: int = 500
    """Write a checkpoint every N updates."""
    checkpoints_total_limit: int | None = None
    """Keep at most this many checkpoints; older ones go once the new one is safe."""
    resume_from_checkpoint: str | None = None
    """`latest`, a `checkpoint-N` of output_dir, or a path."""
    logging_dir: str = "logs"
    """TensorBoard files, under output_dir."""
    report_to: str = "tensorboard"
    """tensorboard, wandb, comet_ml (several with commas), all or none."""
    tracker_project_name: str = "train_controlnet"
    """Project name in the trackers."""
    tracker_group: str | None = None
    """Group of the run in W&B; the trials of a sweep are one."""

    def problems(self) -> Problems:
        yield from at_least(self, 1, "checkpointing_steps", "checkpoints_total_limit")
        yield from folder_problems(self, "output_dir")
        unknown = [name for name in self.trackers if name not in TRACKERS]
        if unknown:
            yield problem_of(
                self, "report_to", f"must be one of {', '.join(TRACKERS)}, all, none, or several with commas"
            )

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers that `report_to` asks for; `all` is for those that are installed to find out."""
        if self.report_to == "none":
            return ()
        if self.report_to == "all":
            return TRACKERS
        return tuple(name.strip() for name in self.report_to.split(","))


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation"""

    validation_prompt: tuple[str, ...] | None = None
    """Prompts to make validation images for; as many as validation images, or one."""
    validation_image: tuple[str, ...] | None = None
    """Control images for validation; as many as prompts, or one."""
    num_validation_images: int = 4
    """Images per prompt-image pair."""
    guidance_scale: float = 7.5
    """How closely images follow the prompt; 1 and less is without guidance, at half the time."""
    validation_steps: int = 100
    """Validate every N updates, and once at the end."""
    validation_split: float | None = None
    """Rows to measure learning by, never trained on: a share below 1 or a count; by default 16 of 320 rows or more."""
    control_fidelity: str | None = None
    """Score validation images by the condition found in them: shape (of a filled outline) or canny (edges)."""

    def held_out_of(self, num_rows: int, num_used: int) -> int:
        """How many of a data set's rows are held out: none, or at least 2, because control images are shuffled.

        Args:
            num_used: rows that max_train_samples leaves.
        """
        split = self.validation_split
        if split is None:
            return HELD_OUT_ROWS if num_rows >= ROWS_TO_SPARE else 0
        return max(2, round(split * num_used)) if 0 < split < 1 else int(split)

    def problems(self) -> Problems:
        split = self.validation_split
        if split is not None and (split < 0 or split == 1 or (split > 1 and split % 1 != 0)):
            yield problem_of(self, "validation_split", "must be a share below 1, a count of at least 2, or 0 for none")
        if bool(self.validation_prompt) != bool(self.validation_image):
            missing = "validation_image" if self.validation_prompt else "validation_prompt"
            yield f"--{missing}: needed, because the other of --validation_prompt and --validation_image is given"
        yield from pair_problems(self, "validation_prompt", "validation_image")
        yield from at_least(self, 1, "num_validation_images", "validation_steps")
        yield from guidance_problems(self)
        yield from one_of(self, "control_fidelity", FIDELITY_MEASURES)
        if self.control_fidelity is not None and not (self.validation_prompt or self.validation_image):
            add = "add --validation_prompt and --validation_image"
            yield problem_of(self, "control_fidelity", f"there are no validation images to score; {add}")

    @property
    def validation_pairs(self) -> tuple[tuple[str, str], ...]:
        """(prompt, control image path) of each validation pair; a single prompt or image is reused."""
        return pairs_of(self.validation_prompt, self.validation_image)


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Hub"""

    push_to_hub: bool = False
    """Upload the final weights, model card and example images to the Hub."""
    hub_token: str | None = field(default=None, repr=False, metadata={"secret": True})
    """Token for the Hub; HF_TOKEN and `hf auth login` work as well. Shown and stored nowhere."""
    hub_model_id: str | None = None
    """Repository to push to; by default the name of output_dir."""
    license: str | None = None
    """Licence named in the model card, such as apache-2.0; by default the base model's."""

    def problems(self) -> Problems:
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            names = "https://hf.co/docs/hub/repositories-licenses"
            yield problem_of(self, "license", f"must be one of the Hub's short names, such as apache-2.0 ({names})")
