"""The settings for what a run leaves: output, validation and Hub. They are declared as in settings.py."""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from pathlib import Path

from raycontrolnet.config.declare import setting
from raycontrolnet.config.rules import (
    Problems,
    at_least,
    folder_problems,
    guidance_problems,
    one_of,
    pair_problems,
    pairs_of,
    problem_of,
    secret_problems,
)
from raycontrolnet.storage.uri import is_uri, shown_uri

# Reasons why all trials of a sweep share a value
METRICS = "decides where metrics go, not what is learned"
PUBLISHING = "is about publishing, not about training"
CHECKPOINTS = "decides when checkpoints are written, not what is learned"
FINAL_WEIGHTS = "decides how the final weights are stored, not what is learned"

TRACKERS = ("tensorboard", "wandb", "comet_ml")
SAFETENSORS = ".safetensors"
WEIGHTS_NAME = "diffusion_pytorch_model"
"""Name of diffusers' files with weights."""
WEIGHTS_FILE = f"{WEIGHTS_NAME}{SAFETENSORS}"
SAVE_PRECISIONS = ("fp32", "fp16", "bf16")
LONGEST_SAVE_NAME = 100
FIDELITY_MEASURES = ("shape", "canny")
HELD_OUT_ROWS = 16
"""Rows held out by default: measuring them every 100 updates of batch 4 costs a few percent."""
ROWS_TO_SPARE = 320
"""Size from which a data set can spare them."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Output: checkpoints, metrics and trackers."""

    output_dir: str = setting(
        "controlnet-model",
        fixed="is the sweep's folder, and every trial gets its own inside",
        instead="name the sweep's folder with --output_dir",
        path="or URI",
        left_out_of_card=True,
        changes_on_resume=True,
    )
    """Folder for everything the run writes; also the URI of one in an object store, such as s3://bucket/folder."""
    checkpointing_steps: int = setting(500, fixed=CHECKPOINTS)
    """Write a checkpoint every N updates."""
    checkpoints_total_limit: int | None = setting(None, fixed=CHECKPOINTS)
    """Keep at most this many checkpoints; the oldest is deleted once a new one is complete."""
    resume_from_checkpoint: str | None = setting(
        None, fixed="is for single runs, as trials start from the beginning", instead="resume a sweep with --resume"
    )
    """`latest` (a new start if there is none yet), a `checkpoint-N` of output_dir, a path, or with an output_dir in an
    object store the URI of a checkpoint there."""
    save_precision: str = setting("fp32", fixed=FINAL_WEIGHTS, changes_on_resume=True)
    """fp32, fp16 or bf16: precision of the final weights; checkpoints stay fp32."""
    save_name: str | None = setting(None, fixed=FINAL_WEIGHTS, changes_on_resume=True, left_out_of_card=True)
    """Write the final weights also as the one file NAME.safetensors, for node-based and web interfaces."""
    logging_dir: str = setting("logs", fixed=METRICS, left_out_of_card=True)
    """TensorBoard files, under output_dir."""
    report_to: str = setting("tensorboard", fixed=METRICS)
    """tensorboard, wandb, comet_ml (several with commas), all or none."""
    tracker_project_name: str = setting("train_controlnet", fixed=METRICS)
    """Project name in the trackers."""
    tracker_group: str | None = setting(None, fixed=METRICS, left_out_of_card=True)
    """Group of the run in W&B; by default the trials of a sweep are one."""

    def problems(self) -> Problems:
        yield from at_least(self, 1, "checkpointing_steps", "checkpoints_total_limit")
        yield from folder_problems(self, "output_dir", or_uri=True)
        yield from secret_problems(self, "resume_from_checkpoint")
        if problem := self._logging_dir_problem():
            yield f"--logging_dir={shown_uri(self.logging_dir)}: {problem}; name a folder in it, such as logs"
        yield from one_of(self, "save_precision", SAVE_PRECISIONS)
        if self.save_name and (problem := save_name_problem(self.save_name)):
            yield f"--save_name={self.save_name[:LONGEST_SAVE_NAME]}: {problem}"
        unknown = [name for name in self.trackers if name not in TRACKERS]
        if unknown:
            yield problem_of(
                self, "report_to", f"must be one of {', '.join(TRACKERS)}, all, none, or several with commas"
            )

    def _logging_dir_problem(self) -> str | None:
        """Return why trackers' files would not be where they can be found; None if they will be."""
        if "://" in self.logging_dir:
            return "must be a folder in --output_dir, not a URI"
        inside = self.logging_pattern.removesuffix("/*")
        if is_uri(self.output_dir) and (inside in (".", "..") or inside.startswith(("/", "../"))):
            where = "is --output_dir itself" if inside == "." else "is not in --output_dir"
            return f"{where}, a folder of an object store, and its files would not be sent there"
        return None

    @property
    def logging_pattern(self) -> str:
        """Pattern of the names of the trackers' files in output_dir."""
        return f"{posixpath.normpath(Path(self.logging_dir).as_posix())}/*"

    @property
    def single_file(self) -> str | None:
        """Name of the one file with the final weights."""
        return f"{self.save_name}{SAFETENSORS}" if self.save_name else None

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers in `report_to`; for `all`, also those that may not be installed."""
        if self.report_to == "none":
            return ()
        if self.report_to == "all":
            return TRACKERS
        return tuple(name.strip() for name in self.report_to.split(","))


def save_name_problem(name: str) -> str | None:
    """Return why NAME.safetensors cannot be written; None if it can."""
    if name.lower().endswith(SAFETENSORS):
        return f"leave out {SAFETENSORS}, which is added"
    if not re.fullmatch(r"\w[\w.+-]*", name):
        return "must be a name of letters, digits, and . _ + -; the file is written to --output_dir"
    if name.lower().startswith(WEIGHTS_NAME):
        return f"is a name of diffusers' own files; take one that does not begin with {WEIGHTS_NAME}"
    if len(name.encode()) > LONGEST_SAVE_NAME:
        return f"is too long; use at most {LONGEST_SAVE_NAME} letters"
    return None


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Validation: held-out rows, and images."""

    validation_prompt: tuple[str, ...] | None = setting(
        None, decides_measurement="which images are scored", may_be_empty=True
    )
    """Prompts to make validation images for; as many as validation images, or one."""
    validation_image: tuple[str, ...] | None = setting(
        None, decides_measurement="which images are scored", path="local"
    )
    """Control images for validation; as many as prompts, or one."""
    num_validation_images: int = setting(4, decides_measurement="how many images are scored")
    """Images per prompt-image pair."""
    guidance_scale: float | None = setting(None, decides_measurement="how the scored images are drawn")
    """Closeness of images to the prompt; up to 1 there is none, in half the time. By default 7.5, for SDXL 5."""
    validation_steps: int = setting(100, decides_measurement="after which updates trials are measured")
    """Validate every N updates, and once at the end."""
    validation_split: float | None = setting(None, decides_measurement="which rows are held out")
    """Validation rows, excluded from training: a fraction or a count; by default 16 if there are 320 rows or more."""
    control_fidelity: str | None = setting(None, decides_measurement="how images are scored")
    """Score validation images by the condition found in them: shape (of a filled outline) or canny (edges)."""

    def problems(self) -> Problems:
        split = self.validation_split
        if split is not None and (split < 0 or split == 1 or (split > 1 and split % 1 != 0)):
            yield problem_of(
                self, "validation_split", "must be a fraction below 1, a count of at least 2, or 0 for none"
            )
        if bool(self.validation_prompt) != bool(self.validation_image):
            given, missing = ("prompt", "image") if self.validation_prompt else ("image", "prompt")
            yield f"--validation_{missing}: required with --validation_{given}"
        yield from pair_problems(self, "validation_prompt", "validation_image")
        yield from at_least(self, 1, "num_validation_images", "validation_steps")
        yield from guidance_problems(self)
        yield from one_of(self, "control_fidelity", FIDELITY_MEASURES)
        if self.control_fidelity is not None and not (self.validation_prompt or self.validation_image):
            add = "add --validation_prompt and --validation_image"
            yield problem_of(self, "control_fidelity", f"there are no validation images to score; {add}")

    @property
    def validation_pairs(self) -> tuple[tuple[str, str], ...]:
        """(prompt, control image path) of each validation pair; a single prompt or image is used for all."""
        return pairs_of(self.validation_prompt, self.validation_image)


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Hub: publishing the ControlNet."""

    push_to_hub: bool = setting(False, fixed=PUBLISHING, changes_on_resume=True, left_out_of_card=True)
    """Upload the final weights, model card and example images to the Hub."""
    hub_token: str | None = setting(
        None,
        secret=True,
        may_be_empty=True,
        fixed="is a secret and does not change what is learned",
        instead="set HF_TOKEN",
    )
    """Token for the Hub; HF_TOKEN and `hf auth login` work as well. It is never shown or stored."""
    hub_model_id: str | None = setting(None, fixed=PUBLISHING, changes_on_resume=True, left_out_of_card=True)
    """Repository to push to; by default the name of output_dir."""
    license: str | None = setting(None, fixed=PUBLISHING)
    """Licence for the model card, such as apache-2.0; by default the base model's."""

    def problems(self) -> Problems:
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            names = "https://hf.co/docs/hub/repositories-licenses"
            yield problem_of(self, "license", f"must be one of the Hub's short names, such as apache-2.0 ({names})")
