"""Loading of one part of a model from a folder or the Hub, with the libraries' many errors as one."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import UserError
from raycontrolnet.text import error_message

Loaded = TypeVar("Loaded")

BASE = "pretrained_model_name_or_path"
VAE = "pretrained_vae_model_name_or_path"


def part(
    model: ModelConfig, token: str | None, load: Callable[..., Loaded], flag: str = BASE, **options: Any
) -> Loaded:
    """Load a part of the model that the setting `flag` names."""
    hub = {"revision": model.revision, "cache_dir": model.cache_dir, "token": token}
    return loaded(flag, getattr(model, flag), load, **hub, **options)


def loaded(flag: str, name: str, load: Callable[..., Loaded], **options: Any) -> Loaded:
    """Call `load(name, **options)`; turn the libraries' many errors into one that names the flag."""
    from safetensors import SafetensorError

    try:
        return load(name, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError, UnpicklingError, EOFError) as error:
        if Path(name).is_absolute() and not Path(name).is_dir():  # the driver has made sure that it is there
            problem = f"the node {socket.gethostname()} does not see it; name a folder on storage that all nodes share"
            raise UserError(f"--{flag}={name}: {problem}") from error
        what = f" ({options['subfolder']})" if "subfolder" in options else ""
        advice = "" if Path(name).is_dir() else "; if it is private, give --hub_token or `hf auth login`"
        reason = error_message(error, 110).rstrip(".")
        raise UserError(f"--{flag}={name}: cannot be loaded{what}: {reason}{advice}") from error
