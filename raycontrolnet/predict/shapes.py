"""A base model and its ControlNet by their configurations alone: shapes without data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.components import Components
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.files import ModelFiles
from raycontrolnet.model.loading import BASE
from raycontrolnet.predict.shape_tensors import ShapeMode
from raycontrolnet.quiet import only_errors


@contextmanager
def shaped(
    family: Family, base: ModelFiles, model: ModelConfig, *, vae: ModelFiles | None, dtype: torch.dtype
) -> Iterator[Components]:
    """Give the models of a base without tokenizers and data; inside, their steps compute shapes alone.

    Args:
        family: of the base.
        base: its files, of which the configurations are read.
        model: the settings, for messages.
        vae: files of another VAE.
        dtype: of the frozen models.

    Raises:
        UserError: if a configuration is missing.
    """
    noise_scheduler = _noise_scheduler(family, base, model)  # real: some compute their tables' bounds
    with ShapeMode():
        yield _models(family, base, model, noise_scheduler, vae=vae, dtype=dtype)


def _noise_scheduler(family: Family, base: ModelFiles, model: ModelConfig) -> Any:
    import diffusers

    with only_errors():
        config = _config(base, "scheduler", model, "scheduler_config.json")
        return getattr(diffusers, family.noise_scheduler).from_config(config)


def _models(
    family: Family,
    base: ModelFiles,
    model: ModelConfig,
    noise_scheduler: Any,
    *,
    vae: ModelFiles | None,
    dtype: torch.dtype,
) -> Components:
    vae_dtype = family.vae_dtype(dtype, named=vae is not None)
    parts = {}
    with only_errors():
        for name, classes in family.part_classes.items():
            config = _config(base, name, model) if name != "vae" or vae is None else _root(vae, model)
            with _default_dtype(vae_dtype if name == "vae" else dtype):
                parts[name] = _part(classes[0], config).requires_grad_(False).eval()
        denoiser = parts.pop(family.denoiser)
        controlnet = family.make_controlnet(denoiser).train()
        for module in family.without_effect(controlnet):
            module.requires_grad_(False)
    return Components(
        family=family,
        tokenizers=(),
        vae=parts.pop("vae"),
        text_encoders=tuple(parts.values()),
        denoiser=denoiser,
        noise_scheduler=noise_scheduler,
        controlnet=controlnet,
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new weights of `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _part(name: str, config: dict[str, Any]) -> Any:
    """Build a model of diffusers or Transformers of its configuration, in torch's default dtype."""
    import diffusers
    import transformers

    if cls := getattr(diffusers, name, None):
        return cls.from_config(config)
    cls = getattr(transformers, name)
    own_dtype = ("dtype", "torch_dtype")  # of the weights in the files
    return cls(cls.config_class.from_dict({key: value for key, value in config.items() if key not in own_dtype}))


def _config(base: ModelFiles, part: str, model: ModelConfig, file: str = "config.json") -> dict[str, Any]:
    if config := base.read_json(f"{part}/{file}"):
        return config
    raise UserError(f"--{BASE}={model.pretrained_model_name_or_path}: its {part}/{file} cannot be read")


def _root(vae: ModelFiles, model: ModelConfig) -> dict[str, Any]:
    if config := vae.read_json("config.json"):
        return config
    name = model.pretrained_vae_model_name_or_path
    raise UserError(f"--pretrained_vae_model_name_or_path={name}: its config.json cannot be read")
