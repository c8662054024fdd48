"""Loading of one part of a model from a folder, the Hub or a single file, with the libraries' many errors as one."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.single_file import BASE_CONFIG, NotABase, config_folder, is_single_file
from raycontrolnet.quiet import only_errors
from raycontrolnet.text import error_message, first_of

Loaded = TypeVar("Loaded")

BASE = "pretrained_model_name_or_path"
VAE = "pretrained_vae_model_name_or_path"


def part(
    model: ModelConfig, token: str | None, load: Callable[..., Loaded], flag: str = BASE, **options: Any
) -> Loaded:
    """Load a part without weights of the model that the setting `flag` names: a configuration, a tokenizer."""
    if flag == BASE and is_single_file(model.pretrained_model_name_or_path):
        return loaded(BASE_CONFIG, _config_folder(model, token), load, **options)
    hub = {"revision": model.revision, "cache_dir": model.cache_dir, "token": token}
    return loaded(flag, getattr(model, flag), load, **hub, **options)


def weights(
    model: ModelConfig,
    token: str | None,
    cls: Any,
    dtype: torch.dtype,
    subfolder: str | None = None,
    *,
    flag: str = BASE,
    variant: str | None = None,
) -> Any:
    """Load a part with weights of the model that the setting `flag` names, on the CPU.

    Args:
        model: names the model.
        token: for private models on the Hub.
        cls: of diffusers or Transformers.
        dtype: of the weights in memory.
        subfolder: of the part.
        flag: the setting.
        variant: of the files.

    Raises:
        UserError: if it cannot be loaded.
    """
    place = {"subfolder": subfolder} if subfolder else {}
    if flag == BASE and is_single_file(model.pretrained_model_name_or_path):
        config = _config_folder(model, token)
        return loaded(flag, model.pretrained_model_name_or_path, _from_single_file, cls=cls, config=config,
                      dtype=dtype, **place)  # fmt: skip
    precision = "dtype" if cls.__module__.startswith("transformers.") else "torch_dtype"
    options: dict[str, Any] = {precision: dtype, "variant": variant, "use_safetensors": True, **place}
    return part(model, token, partial(from_pretrained, cls), flag, **options)


def from_pretrained(cls: Any, name_or_path: str, **options: Any) -> Any:
    """Call `cls.from_pretrained`, of diffusers or Transformers, which would draw weights that the files lack.

    Raises:
        ValueError: if they lack some.
    """
    module, info = cls.from_pretrained(name_or_path, output_loading_info=True, **options)
    _check_whole(info["missing_keys"])
    return module


def _check_whole(missing: Iterable[str]) -> None:
    if names := sorted(missing):
        raise ValueError(f"it lacks the weight {first_of(names, 1)}; download it anew")


def _config_folder(model: ModelConfig, token: str | None) -> str:
    try:
        return config_folder(model, token)
    except (NotABase, OSError, ValueError) as error:
        name = model.pretrained_model_name_or_path
        if not Path(name).is_file():
            raise UserError(_not_seen(BASE, name)) from error
        raise UserError(f"--{BASE}={name}: its configuration cannot be had ({error_message(error, 110)})") from error


def _from_single_file(path: str, *, cls: Any, config: str, dtype: torch.dtype, subfolder: str) -> Any:
    """Load a part of a single file.

    Raises:
        ValueError: if it lacks weights.
    """
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm, load_single_file_checkpoint

    options: dict[str, Any] = {"config": config, "subfolder": subfolder, "torch_dtype": dtype, "local_files_only": True}
    try:
        with only_errors():  # diffusers warns of modules in fp32 that are none
            if cls.__module__.startswith("transformers."):
                found = create_diffusers_clip_model_from_ldm(cls, load_single_file_checkpoint(path), **options)
            else:
                found = cls.from_single_file(path, **options)
    except (NotImplementedError, KeyError) as error:  # of PyTorch: some were not filled; of diffusers' converters
        raise ValueError(f"it lacks weights that the {subfolder} of its configuration, {config}, has") from error
    _check_whole(name for name, value in found.named_parameters() if value.is_meta)
    return found


def _not_seen(flag: str, name: str) -> str:
    """Return the problem of a path that the driver has seen, and this machine does not."""
    problem = f"the node {socket.gethostname()} does not see it; name a folder on storage that all nodes share"
    return f"--{flag}={name}: {problem}"


def loaded(flag: str, name: str, load: Callable[..., Loaded], **options: Any) -> Loaded:
    """Call `load(name, **options)`; turn the libraries' many errors into one that names the flag."""
    from safetensors import SafetensorError

    try:
        return load(name, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, EOFError) as error:
        if Path(name).is_absolute() and not Path(name).exists():
            raise UserError(_not_seen(flag, name)) from error
        what = f" ({options['subfolder']})" if "subfolder" in options else ""
        advice = "" if Path(name).exists() else "; if it is private, give --hub_token or `hf auth login`"
        reason = error_message(error, 110).rstrip(".")
        raise UserError(f"--{flag}={name}: cannot be loaded{what}: {reason}{advice}") from error
