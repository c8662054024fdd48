"""The files of the VAE that encodes, looked at without reading the model."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.loading import BASE, VAE
from raycontrolnet.model.single_file import VAE as VAE_WEIGHTS
from raycontrolnet.model.single_file import NotABase, config_folder, is_single_file, read_header, weights_of
from raycontrolnet.text import error_message

VAE_CONFIG = "config.json"
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
        """Find the VAE, named or the base model's, in a local folder, or download its files from the Hub.

        Raises:
            UserError: if they are not there.
        """
        flag = VAE if model.pretrained_vae_model_name_or_path else BASE
        try:
            if flag == BASE and is_single_file(model.pretrained_model_name_or_path):
                config_path = Path(config_folder(model, token), "vae", VAE_CONFIG)
                fingerprint = _hash_of_single_file(config_path, Path(model.pretrained_model_name_or_path))
            else:
                config_path = _file(model, VAE_CONFIG, token)
                fingerprint = _hash(config_path, _weights(model, token))
            config: dict[str, Any] = json.loads(config_path.read_bytes())
            return VaeFiles(
                fingerprint=fingerprint,
                latent_channels=config["latent_channels"],
                factor=2 ** (len(config["block_out_channels"]) - 1),
            )
        except (OSError, ValueError, KeyError, NotABase) as error:
            raise UserError(
                f"--{flag}={getattr(model, flag)}: its VAE cannot be read "
                f"({error_message(error, 110)}); if it is private, give --hub_token or `hf auth login`"
            ) from None


def _weights(model: ModelConfig, token: str | None) -> Path:
    """Return the file that diffusers would load."""
    from huggingface_hub.errors import EntryNotFoundError

    # A VAE that comes alone may lack the base model's variant.
    variants = [model.variant, None] if model.pretrained_vae_model_name_or_path else [model.variant]
    endings = [f".{variant}" if variant else "" for variant in dict.fromkeys(variants)]
    names = [f"diffusion_pytorch_model{end}.safetensors" for end in endings]
    for name in names:
        with suppress(FileNotFoundError, EntryNotFoundError):
            return _file(model, name, token)
    raise FileNotFoundError(f"none of {', '.join(names)}")


def _file(model: ModelConfig, name: str, token: str | None) -> Path:
    named = model.pretrained_vae_model_name_or_path
    place, subfolder = (named, None) if named else (model.pretrained_model_name_or_path, "vae")
    if Path(place).is_dir():
        path = Path(place, subfolder or "", name)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return path
    from huggingface_hub import hf_hub_download

    options: dict[str, Any] = {"revision": model.revision, "cache_dir": model.cache_dir, "token": token}
    return Path(hf_hub_download(place, name, subfolder=subfolder, **options))


def _hash(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()[:16]


def _hash_of_single_file(config: Path, path: Path) -> str:
    """Hash the VAE's weights alone, a tenth of such a file."""
    digest = hashlib.sha256(config.read_bytes())
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in weights_of(read_header(path), VAE_WEIGHTS).items():
            (begin, end), shape = entry["data_offsets"], entry["shape"]
            digest.update(f"{name} {entry['dtype']} {shape}".encode())
            file.seek(start + begin)
            digest.update(file.read(end - begin))
    return digest.hexdigest()[:16]
