"""The contract of a family of base models: all that differs between families, and nothing else.

A family has no state: it is told the models and the batch. The training step is written in its terms:

    latents = sample of the VAE's posterior, scaled             scale_latents
    conditioning = captions, encoded, and perhaps sizes         tokenize (on the host), encode_prompts (on the device)
    timestep of a sample                                        draw_timestep (on the host)
    noisy_latents, target = latents and noise at a timestep     diffuse
    control = conditioning images as the ControlNet takes them  control
    prediction = model(noisy_latents, conditioning, control)    predict

To add one, write a file beside this one, and add a line to registry.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raycontrolnet.config.objective_settings import ObjectiveConfig
from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.model.layout import Layout

if TYPE_CHECKING:
    import numpy as np
    from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin
    from transformers import PreTrainedTokenizerBase

    from raycontrolnet.model.batch import Batch, Draws
    from raycontrolnet.model.components import Components

Conditioning = dict[str, Any]
"""Arguments that the ControlNet and the base model share besides latents and timesteps."""


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """A family of base models."""

    name: str
    """Short name, which no other family has."""
    title: str
    """Its name in messages, --help and README."""
    part_classes: Mapping[str, tuple[str, ...]]
    """Folder of a part with weights -> classes that are loaded, the denoiser first."""
    tokenizers: tuple[str, ...]
    """Folders of the tokenizers."""
    denoiser_title: str
    """The denoiser's kind in messages."""
    controlnet: str
    """Class of diffusers of its ControlNets."""
    shared_config: tuple[str, ...]
    """Entries of config.json in which a ControlNet and the denoiser that it was made of agree."""
    copied: tuple[str, ...]
    """Beginnings of the names of the denoiser's weights that a ControlNet has as well."""
    noise_scheduler: str
    """Class of diffusers that has the noise of its training."""
    pipeline: str
    """Class of diffusers that draws with a ControlNet."""
    control_argument: str = "image"
    """The pipeline's name for the control images."""
    sampler: str = "UniPCMultistepScheduler"
    """Class of diffusers that the pipeline's steps are taken with."""
    tags: tuple[str, ...]
    """Tags of its model cards, besides those of every family."""
    interpolation: str = "bilinear"
    """Resizing of images unless --image_interpolation_mode says otherwise: that of diffusers' script."""
    guidance_scale: float = 7.5
    """Guidance of images unless --guidance_scale says otherwise: that of diffusers' pipeline."""
    resolution_multiple: int = 8
    """Number that divides the width and height of images, in pixels."""
    has_size_conditions: bool = False
    """Batches carry the images' sizes and crops."""
    encodes_control: bool = False
    """`control` needs the VAE, also where the images' latents are cached."""
    layouts: tuple[Layout, ...] = ()
    """Layouts of single files that can be its bases."""
    copied_of_files: tuple[str, ...] = ()
    """`copied`, as single files name these weights."""

    @property
    def denoiser(self) -> str:
        """Folder of the model that removes noise."""
        return next(iter(self.part_classes))

    # --- which bases are of this family ---

    @abstractmethod
    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Check that the denoiser or ControlNet with this config.json is of this family, or nearly."""

    @abstractmethod
    def kind_of_other(self, config: Mapping[str, Any]) -> str | None:
        """Return the kind of a recognized denoiser that cannot be trained all the same; None if it can."""

    @abstractmethod
    def scheduler_problem(self, config: Mapping[str, Any]) -> str | None:
        """Return what is wrong with a base of this scheduler_config.json; None if nothing is."""

    def objective_problems(self, objective: ObjectiveConfig, scheduler: Mapping[str, Any]) -> Iterator[str]:
        """Yield a problem for each setting of the objective that a base of this scheduler_config.json cannot have."""
        if objective.snr_gamma is not None:
            reason = f"weights the loss by DDPM's signal-to-noise ratio, which {self.title} is not trained by"
            yield f"--snr_gamma={objective.snr_gamma:g}: {reason}; leave it out, or see --timestep_sampling"
        if objective.rescale_betas_zero_snr:
            reason = f"rescales DDPM's noise schedule, which {self.title} does not have"
            yield f"--rescale_betas_zero_snr: {reason}; leave it out"

    def kind_of_file(self, header: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Return the kind of a single file that has a layout of this family and is no base; None if it is one.

        Args:
            header: names, types and shapes of its weights.
        """
        return None

    def file_problem(self, config: Mapping[str, Any], header: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Return why the denoiser in a single file is not that of this config.json; None if it may be."""
        return None

    def latent_channels(self, config: Mapping[str, Any]) -> int | None:
        """Return the channels of the latents that the denoiser with this config.json takes; None if it does not say."""
        return config.get("in_channels")

    # --- loading ---

    @abstractmethod
    def load_denoiser(self, model: ModelConfig, token: str | None) -> tuple[Any, SchedulerMixin]:
        """Load the model that removes noise, in fp32 on the CPU, and its noise scheduler."""

    def with_zero_snr(self, noise_scheduler: Any) -> Any:
        """Return the scheduler with its noise rescaled, unless `objective_problems` refuses that."""
        raise NotImplementedError(self.name)

    def move_tables(self, noise_scheduler: Any, device: torch.device) -> None:
        """Move the tables of the scheduler that `diffuse` looks up to the device: a step must not wait for a copy."""
        return

    @abstractmethod
    def load_text(
        self, model: ModelConfig, token: str | None, dtype: torch.dtype
    ) -> tuple[tuple[PreTrainedTokenizerBase, ...], tuple[Any, ...]]:
        """Load tokenizers and text encoders on the CPU."""

    @abstractmethod
    def make_controlnet(self, denoiser: Any) -> ModelMixin:
        """Make a ControlNet of the denoiser: its weights, and new ones by torch's random state."""

    def without_effect(self, controlnet: Any) -> Sequence[torch.nn.Module]:
        """Return the modules of a ControlNet whose weights reach no prediction: they are not trained."""
        return ()

    def vae_dtype(self, dtype: torch.dtype, *, named: bool) -> torch.dtype:
        """Return the precision of the VAE in training, by that of the other frozen models.

        Args:
            named: the VAE is not the base model's own.
        """
        return dtype

    # --- a training step ---

    @abstractmethod
    def tokenize(self, tokenizers: Sequence[PreTrainedTokenizerBase], prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return the tokens of the prompts by each tokenizer, int64 [B, T], on the CPU."""

    @abstractmethod
    def encode_prompts(self, components: Components, batch: Batch) -> Conditioning:
        """Return the conditioning of a batch on the device: its prompts, encoded, and what else the family needs."""

    @abstractmethod
    def scale_latents(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        """Bring latents [B, C, h, w] from the VAE's scale to that of the denoiser."""

    @abstractmethod
    def unscale_latents(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        """Bring latents [B, C, h, w] from the denoiser's scale to that of the VAE."""

    @abstractmethod
    def draw_timestep(self, rng: np.random.Generator, noise_scheduler: SchedulerMixin) -> float:
        """Draw the timestep of a sample as the base models are trained: all integers, or all floats."""

    def uniform_timestep(self, rng: np.random.Generator, noise_scheduler: SchedulerMixin) -> float:
        """Draw the timestep of a sample so that all training timesteps are as likely."""
        return self.spread_timestep(rng.random(), noise_scheduler)

    @abstractmethod
    def spread_timestep(self, fraction: float, noise_scheduler: SchedulerMixin) -> float:
        """Return the timestep that this share of the training timesteps lies below; `fraction` is in [0, 1)."""

    def control(self, components: Components, conditioning_images: Tensor) -> Tensor:
        """Return conditioning images uint8 [B, H, W, 3] as the ControlNet takes them: [B, 3, H, W] in [0, 1]."""
        return conditioning_images.permute(0, 3, 1, 2).float() / 255.0

    @abstractmethod
    def diffuse(self, noise_scheduler: SchedulerMixin, latents: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Return the noised sample at the drawn timesteps, and the target of its prediction; fp32 [B, C, h, w]."""

    def min_snr_weights(self, noise_scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
        """Return the weights of the samples' losses, fp32 [B], unless `objective_problems` refuses --snr_gamma."""
        raise NotImplementedError(self.name)

    @abstractmethod
    def predict(
        self,
        components: Components,
        controlnet: torch.nn.Module,
        noisy_latents: Tensor,
        timesteps: Tensor,
        control: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        """Return the base model's prediction for the noised sample, steered by the ControlNet, [B, C, h, w].

        On a GPU a CUDA graph replays this, `control`, `diffuse` and `min_snr_weights`: none may wait for the device,
        and what depends on a batch must be in tensors.

        Args:
            controlnet: as it is trained, perhaps wrapped.
            control: of `control`.
        """

    # --- results ---

    def modelspec_architecture(self, controlnet: Mapping[str, Any], prediction_type: str | None) -> str | None:
        """Return the name that Stability AI's ModelSpec has for bases of this family; None if there is none.

        Args:
            controlnet: configuration of the ControlNet.
            prediction_type: the base model's, if it is known.
        """
        return None

    # --- drawing ---

    @abstractmethod
    def build_pipeline(self, components: Components) -> Any:
        """Build diffusers' pipeline on the models in memory; load and copy nothing."""
