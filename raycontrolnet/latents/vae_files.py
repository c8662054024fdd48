"""The files of a base model's VAE, looked at without torch or reading the model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import UserError
from raycontrolnet.text import error_message

CONFIG = "config.json"
BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class VaeFiles:
    """Facts of a VAE for the latent cache."""

    fingerprint: str
    """Hash of configuration and weights."""
    latent_channels: int
    factor: int
    """Pixels per latent, along one side."""

    @staticmethod
    def find(model: ModelConfig, token: str | None) -> VaeFiles:
        """Find the VAE of the base model in a local folder, or download its files from the Hub.

        Raises:
            UserError: if they are not there.
        """
        try:
            config_path = _file(model, CONFIG, token)
            weights = next(path for name in _weight_names(model) if (path := _file_or_none(model, name, token)))
            config: dict[str, Any] = json.loads(config_path.read_bytes())
            return VaeFiles(
                fingerprint=_hash(config_path, weights),
                latent_channels=config["latent_channels"],
                factor=2 ** (len(config["block_out_channels"]) - 1),
            )
        except StopIteration:
            reason = f"none of {', '.join(_weight_names(model))}"
        except (OSError, ValueError, KeyError) as error:
            reason = error_message(error, 200)
        raise UserError(
            f"--pretrained_model_name_or_path={model.pretrained_model_name_or_path}: its VAE cannot be read "
            f"({reason}); give a folder in diffusers' layout or a Hub id; a private one needs --hub_token or "
            "`hf auth login`"
        )


def _weight_names(model: ModelConfig) -> list[str]:
    """Return the file names in the order in which diffusers looks for them."""
    variant = f".{model.variant}" if model.variant else ""
    return [f"diffusion_pytorch_model{variant}.{kind}" for kind in ("safetensors", "bin")]


def _file_or_none(model: ModelConfig, name: str, token: str | None) -> Path | None:
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _file(model, name, token)
    except (FileNotFoundError, EntryNotFoundError):
        return None


def _file(model: ModelConfig, name: str, token: str | None) -> Path:
    base = model.pretrained_model_name_or_path
    if Path(base).is_dir():
        path = Path(base, "vae", name)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return path
    from huggingface_hub import hf_hub_download

    return Path(
        hf_hub_download(base, name, subfolder="vae", revision=model.revision, cache_dir=model.cache_dir, token=token)
    )


def _hash(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()[:16]
