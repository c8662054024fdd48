"""Checks of settings against this machine, before Ray starts or a model is read: folders, models, extras, device."""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.errors import ConfigError, UserError
from raycontrolnet.version import __version__

BASE_PARTS = ("unet", "vae", "text_encoder", "scheduler")
"""Folders of a base model."""
VERSIONS_OF = ("ray", "torch", "diffusers", "transformers", "accelerate", "datasets")


def versions() -> dict[str, str]:
    """Of this package and those that decide what a run computes."""
    return {"raycontrolnet": __version__} | {name: importlib.metadata.version(name) for name in VERSIONS_OF}


def missing_extras(config: TrainConfig) -> Iterator[str]:
    """Optional packages that the settings need and that are not installed."""
    for flag, needed, package, extra in (
        ("use_8bit_adam", config.use_8bit_adam, "bitsandbytes", "8bit"),
        ("enable_xformers_memory_efficient_attention", config.enable_xformers_memory_efficient_attention, "xformers",
         "xformers"),
    ):  # fmt: skip
        if needed and importlib.util.find_spec(package) is None:
            yield f"--{flag}: {package} is not installed; run pip install 'raycontrolnet[{extra}]'"


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Add what a check raises to `problems`, so that the others are made as well."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def local_model_problems(config: TrainConfig) -> Iterator[str]:
    """Model folders that are named as paths but are not there; Hub ids are found out by the workers."""
    for flag, parts in (
        ("pretrained_model_name_or_path", BASE_PARTS),
        ("controlnet_model_name_or_path", ()),
        ("tokenizer_name", ()),
    ):
        name = getattr(config, flag)
        if name is not None and (problem := not_a_model(name, flag, parts)):
            yield problem


def not_a_model(name: str, flag: str, parts: Sequence[str]) -> str | None:
    """What is wrong with the folder `name`, which must have all of `parts`; Hub ids pass."""
    path = Path(name)
    if path.is_dir():
        missing = [part for part in parts if not (path / part).is_dir()]
        if missing:
            return f"--{flag}={name}: no {', '.join(missing)} in that folder; it must be in diffusers' layout"
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        return f"--{flag}={name}: no such folder, and not the form of a Hub id (owner/name)"
    return None


def unwritable(folder: Path, flag: str) -> str | None:
    """What keeps results from being written to `folder`, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # os.access tells root that it may, also where it may not
            pass
    except OSError as error:
        return f"--{flag}={folder}: cannot be written ({error.strerror}); name another folder"
    return None


def with_absolute_paths(config: TrainConfig, output_dir: Path) -> TrainConfig:
    """Paths as workers in other directories must see them; names that are no paths here (Hub ids) stay."""
    paths: dict[str, Any] = {"output_dir": str(output_dir)}
    for name in (
        "pretrained_model_name_or_path", "controlnet_model_name_or_path", "tokenizer_name", "cache_dir",
        "train_data_dir", "dataset_name",
    ):  # fmt: skip
        value = getattr(config, name)
        if value is not None and (Path(value).expanduser().exists() or name in ("cache_dir", "train_data_dir")):
            paths[name] = str(Path(value).expanduser().resolve())
    if config.latents_cache_dir is not None and "://" not in config.latents_cache_dir:
        paths["latents_cache_dir"] = str(Path(config.latents_cache_dir).expanduser().resolve())
    if config.validation_image:
        paths["validation_image"] = tuple(str(Path(path).expanduser().resolve()) for path in config.validation_image)
    return dataclasses.replace(config, **paths)


def check_device(config: TrainConfig, *, use_gpu: bool, has_gpu: bool) -> None:
    """What can be known only once the device is.

    Raises:
        ConfigError: if a setting cannot run on it.
    """
    if use_gpu and not has_gpu:
        raise ConfigError(["--use_gpu=True: there is no GPU here; leave the flag out to train on the CPU"])
    if config.mixed_precision == "fp16" and not use_gpu:
        raise ConfigError(["--mixed_precision=fp16: needs a GPU; use bf16 or no on the CPU"])
    if config.enable_xformers_memory_efficient_attention and not use_gpu:
        raise ConfigError(["--enable_xformers_memory_efficient_attention: needs a GPU; leave it out on the CPU"])


def find_token(hub_token: str | None) -> str | None:
    """The token to use: --hub_token, or else HF_TOKEN or the one of `hf auth login`."""
    from huggingface_hub import get_token

    return hub_token or get_token()
