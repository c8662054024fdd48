"""The base model with a ControlNet: loaded, checked, copied, frozen. What differs between families is in families/."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from raycontrolnet.config.objective_settings import PLAIN, ObjectiveConfig
from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.families.registry import denoiser_folders, denoiser_problem, family_of, trained
from raycontrolnet.model.fractions import draw_fraction
from raycontrolnet.model.loading import BASE, from_pretrained, loaded, part
from raycontrolnet.model.problems import mismatch
from raycontrolnet.model.vae import load_vae
from raycontrolnet.quiet import only_errors
from raycontrolnet.text import error_message

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin
    from transformers import PreTrainedTokenizerBase


RESUME = "resume_from_checkpoint"
OTHER_BASE = "name the base model that it was trained on, or start anew in another --output_dir"


@dataclass
class Components:
    """All models of a training step or a validation image; all but `controlnet` are frozen."""

    family: Family
    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    text_encoders: tuple[Any, ...]
    """One for each tokenizer."""
    vae: AutoencoderKL
    denoiser: ModelMixin
    """The model that removes noise: a UNet, a transformer."""
    noise_scheduler: SchedulerMixin
    controlnet: ModelMixin
    """fp32, trained."""
    compiled: bool = False
    """True if the denoiser and the ControlNet are compiled, for batches of the step's shape."""

    def frozen(self) -> tuple[torch.nn.Module, ...]:
        """Return the modules that training does not change."""
        return *self.text_encoders, self.vae, self.denoiser

    def with_own_tokenizers(self) -> Components:
        """Return the components with copies of the tokenizers, of which padding and truncation are states."""
        return replace(self, tokenizers=copy.deepcopy(self.tokenizers))

    def draw_timestep(self, rng: np.random.Generator, objective: ObjectiveConfig = PLAIN) -> float:
        """Draw the timestep of a sample, as the objective has it, or else as the family does."""
        if objective.timestep_sampling is None:
            return self.family.draw_timestep(rng, self.noise_scheduler)
        if objective.timestep_sampling == "uniform":
            return self.family.uniform_timestep(rng, self.noise_scheduler)
        return self.family.spread_timestep(draw_fraction(rng, objective), self.noise_scheduler)


def load_components(
    model: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    token: str | None = None,
    controlnet_path: str | None = None,
    controlnet_flag: str = "controlnet_model_name_or_path",
    vae_device: torch.device | None = None,
    objective: ObjectiveConfig = PLAIN,
) -> Components:
    """Load the base model, and make or load the ControlNet.

    Args:
        dtype: precision of the frozen models. The ControlNet is fp32 whatever its files hold.
        seed: decides the parts of the ControlNet without weights to copy, such as a conditioning embedding.
        token: for private models on the Hub.
        controlnet_path: a checkpoint's ControlNet, instead of the settings'.
        controlnet_flag: the flag that names the settings' ControlNet, for messages.
        vae_device: where the VAE is kept, if not on `device`, and if the family does not need it there.
        objective: what the model is trained by; decides whether the noise is rescaled.

    Raises:
        UserError: if a part is missing or unreadable, or the model is of a kind that cannot be trained.
    """
    family = _family(model, token)
    if problem := family.scheduler_problem(_config(model, token, "scheduler")):
        raise _unsuitable(model, problem)
    denoiser, noise_scheduler = family.load_denoiser(model, token)
    noise_scheduler = _scheduler_for(objective, family, noise_scheduler)
    tokenizers, text_encoders = family.load_text(model, token, dtype)
    vae_dtype = family.vae_dtype(dtype, named=model.pretrained_vae_model_name_or_path is not None)
    vae = load_vae(model, dtype=vae_dtype, token=token)
    if controlnet_path:
        if problem := _mismatch(controlnet_path, denoiser, RESUME):
            raise UserError(f"--{RESUME}={controlnet_path}: {problem}; {OTHER_BASE}")
        controlnet = load_controlnet(controlnet_path, family, RESUME)
    elif named := model.controlnet_model_name_or_path:
        hub = {"cache_dir": model.cache_dir, "token": token}
        if problem := _mismatch(named, denoiser, controlnet_flag, **hub):
            raise UserError(f"--{controlnet_flag}={named}: {problem}")
        controlnet = load_controlnet(named, family, controlnet_flag, **hub)
    else:  # before the denoiser's weights are rounded
        controlnet = _copied_controlnet(model, family, denoiser, seed)
    # Convolutions are faster in this layout: 11% of a step on a CPU (tests/benchmarks/RESULTS.md). The ControlNet's
    # activations follow it; its weights stay as they are saved. Rounded before it is moved, which needs half the room.
    with only_errors():  # diffusers warns of modules in fp32 that are none
        denoiser.to(dtype=dtype, memory_format=torch.channels_last)
    components = Components(family, tokenizers, text_encoders, vae, denoiser, noise_scheduler, controlnet)
    waits = vae_device is not None and not family.encodes_control
    for module in components.frozen():
        module.requires_grad_(False).eval().to(vae_device if module is vae and waits else device)
    controlnet.requires_grad_(True).train().to(device)
    family.move_tables(noise_scheduler, device)
    for module in family.without_effect(controlnet):  # for their gradients workers would wait
        module.requires_grad_(False)
    return components


def _scheduler_for(objective: ObjectiveConfig, family: Family, noise_scheduler: Any) -> Any:
    """Return the scheduler, with its noise rescaled to a last timestep without signal if the objective says so.

    Raises:
        UserError: if the base model cannot have the objective; on a cluster the driver may not see the model.
    """
    if problems := list(family.objective_problems(objective, noise_scheduler.config)):
        raise UserError("\n".join(problems))
    return family.with_zero_snr(noise_scheduler) if objective.rescale_betas_zero_snr else noise_scheduler


def _unsuitable(model: ModelConfig, problem: str) -> UserError:
    return UserError(f"--{BASE}={model.pretrained_model_name_or_path}: {problem}")


def _family(model: ModelConfig, token: str | None) -> Family:
    """Return the family of the base model, by its small files.

    Raises:
        UserError: if they are missing, or it is of a kind that cannot be trained.
    """
    config = _denoiser_config(model, token)
    family, problem = family_of(config), denoiser_problem(config)
    if problem or family is None:
        raise _unsuitable(model, problem or f"is of no family that is known; {trained()}")
    return family


def _denoiser_config(model: ModelConfig, token: str | None) -> dict[str, Any]:
    """Return the configuration of the base model's denoiser, from the first folder that has one.

    Raises:
        UserError: of the first folder, if none has one.
    """
    problems = []
    for folder in denoiser_folders():
        try:
            return _config(model, token, folder)
        except UserError as error:
            problems.append(error)
    raise problems[0]


def _config(model: ModelConfig, token: str | None, folder: str) -> dict[str, Any]:
    """Return the configuration of the base model's denoiser or scheduler."""
    from diffusers import DDPMScheduler, UNet2DConditionModel  # which read those of others too

    cls = DDPMScheduler if folder == "scheduler" else UNet2DConditionModel
    config: dict[str, Any] = part(model, token, cls.load_config, subfolder=folder)
    return config


def load_controlnet(
    name_or_path: str, family: Family, flag: str = "controlnet_model_name_or_path", **options: Any
) -> ModelMixin:
    """Load a ControlNet from a folder or the Hub, in fp32."""
    import diffusers

    cls = getattr(diffusers, family.controlnet)
    options |= {"torch_dtype": torch.float32, "use_safetensors": True}
    controlnet = loaded(flag, name_or_path, partial(from_pretrained, cls), **options)
    # Copied, because MKL rounds differently at the odd addresses of a mapped file, and a resumed run must compute what
    # it would have computed.
    for weight in controlnet.parameters():
        weight.data = weight.data.clone()
    return controlnet


def _mismatch(controlnet: str, denoiser: ModelMixin, flag: str, **options: Any) -> str | None:
    """Return why the ControlNet in a folder or on the Hub does not fit the denoiser, by its class and sizes."""
    from diffusers import ControlNetModel  # which reads the configuration of any model

    config = loaded(flag, controlnet, ControlNetModel.load_config, **options)
    return mismatch(config, {**denoiser.config, "_class_name": type(denoiser).__name__})


def _copied_controlnet(model: ModelConfig, family: Family, denoiser: ModelMixin, seed: int) -> ModelMixin:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return family.make_controlnet(denoiser)
        except (ValueError, RuntimeError, AttributeError) as error:
            problem = f"cannot be copied into a ControlNet ({error_message(error, 100)}); {trained()}"
            raise _unsuitable(model, f"its {family.denoiser_title} {problem}") from error
