"""A trained ControlNet on disk or on the Hub: its weights, and the settings in its run's config.yaml.

    my-controlnet/                    config.yaml, and after the run's end the weights
        checkpoint-500/
            controlnet/               weights

A Hub id has no config.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycontrolnet.config.train_config import TrainConfig, typed_settings
from raycontrolnet.config.values import read_yaml, setting_types
from raycontrolnet.errors import ConfigError
from raycontrolnet.model.families.registry import controlnet_classes
from raycontrolnet.model.paths import CONTROLNET, file_advice
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.storage.files import read_json
from raycontrolnet.storage.stored_folder import folder_containing
from raycontrolnet.storage.uri import UNUSABLE, as_path, check_bucket, is_uri, shown_name, shown_uri, unusable

CONFIG_FILE = "config.yaml"

OF_THE_BASE = (
    "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "base_config", "revision", "variant",
    "tokenizer_name", "cache_dir",
)  # fmt: skip
OF_THE_RUN = (
    "resolution", "aspect_buckets", "image_interpolation_mode", "mixed_precision", "allow_tf32", "guidance_scale",
    "rescale_betas_zero_snr",
)  # fmt: skip
"""Together with `OF_THE_BASE` the settings that a run's images depend on."""


@dataclass(frozen=True)
class FoundControlNet:
    """A ControlNet to draw with."""

    name_or_path: str
    """The folder with config.json and weights, or a Hub id."""
    settings: Mapping[str, Any]
    """Settings of its run's config.yaml, as far as `OF_THE_BASE` and `OF_THE_RUN` name them."""
    config_file: Path | None
    """The run's config.yaml."""

    def settings_with(self, base: str | None) -> dict[str, Any]:
        """Return the settings to draw with, without those of the run's base model if `base` is another one."""
        if base in (None, self.settings.get("pretrained_model_name_or_path")):
            return dict(self.settings)
        return {name: value for name, value in self.settings.items() if name in OF_THE_RUN}


def find(name: str) -> FoundControlNet:
    """Find the ControlNet that a user names: a run's output_dir, a checkpoint-N, a ControlNet's folder, or a Hub id.

    One in an object store is fetched.

    Raises:
        ConfigError: if there is none at that path or URI, or its run's config.yaml cannot be used.
    """
    path = _fetched(name) if is_uri(name) else Path(as_path(name)).expanduser()
    if not path.exists():
        return FoundControlNet(name, {}, None)
    if not path.is_dir():
        raise ConfigError([f"--controlnet={shown_name(name)}: {file_advice(path, CONTROLNET)}"])
    path = path.resolve()
    file = _config_file(path)
    return FoundControlNet(str(_weights_folder(path, name)), _read(file, name) if file else {}, file)


def _fetched(uri: str) -> Path:
    """Fetch a ControlNet and its run's config.yaml, which lie on this machine as they do in the object store."""
    folder, inner = folder_containing(uri, "controlnet")
    names = ("config.json", "diffusion_pytorch_model*", *((f"{checkpoints.CONTROLNET_FOLDER}/*",) if inner else ()))
    try:
        check_bucket(uri)
        folder.pull(CONFIG_FILE, *(f"{inner}{name}" for name in names))
        places = (folder.path / inner, folder.path / inner / checkpoints.CONTROLNET_FOLDER)
        if not any((place / "config.json").is_file() for place in places):
            if re.fullmatch(r"\w+-\d+", folder.name):  # a typo in checkpoint-N
                folder, _ = folder_containing(folder.parent, "controlnet")
            last = folder.latest()
            advice = f"name a checkpoint of it, such as {folder.place_of(last)}" if last else "look for its name"
            raise ConfigError([f"--controlnet={shown_uri(uri)}: there is no ControlNet; {advice}"])
    except UNUSABLE as error:
        raise ConfigError([f"--controlnet={shown_uri(uri)}: {unusable(error)}"]) from None
    return folder.path / inner


def _weights_folder(path: Path, name: str) -> Path:
    for folder in (path, path / checkpoints.CONTROLNET_FOLDER):
        if (folder / "config.json").is_file():
            kind, classes = read_json(folder / "config.json").get("_class_name"), controlnet_classes()
            if kind not in (None, *classes):
                problem = f"holds a {kind}, not a {' or '.join(classes)}"
                raise ConfigError([f"--controlnet={shown_name(name)}: {problem}"])
            return folder
    if last := checkpoints.latest(path):
        problem = f"that run has no final weights yet; name a checkpoint of it, such as {last.path}"
    else:
        problem = "holds no ControlNet in diffusers' form (config.json and weights)"
    raise ConfigError([f"--controlnet={shown_name(name)}: {problem}"])


def _config_file(folder: Path) -> Path | None:
    """Find the config.yaml of the run that wrote `folder`: its output_dir, a checkpoint-N, or its controlnet/."""
    run = folder.parent if folder.name == checkpoints.CONTROLNET_FOLDER else folder
    places = [folder, run.parent] if checkpoints.is_name(run.name) else [folder]
    return next((place / CONFIG_FILE for place in places if (place / CONFIG_FILE).is_file()), None)


def _read(file: Path, name: str) -> dict[str, Any]:
    """Read the settings that images depend on. The file may be of a version with settings unknown to this one."""
    place = f"--controlnet={shown_name(name)}: {file}"
    kinds = {name: kind for name, kind in setting_types(TrainConfig).items() if name in OF_THE_BASE + OF_THE_RUN}
    written = {key: value for key, value in read_yaml(file, place).items() if value != ""}  # as of an earlier version
    settings, problems = typed_settings(written, kinds, place)
    if problems:
        raise ConfigError(problems)
    if (cache_dir := settings.get("cache_dir")) and not Path(cache_dir).is_dir():
        del settings["cache_dir"]  # of another machine
    return settings
