"""Paths, addresses and Hub ids that settings give for models: what is there, and what to do with something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raycontrolnet.config.output_settings import SAFETENSORS
from raycontrolnet.config.train_config import FACTS
from raycontrolnet.model.base_family import family_in
from raycontrolnet.model.families.registry import denoiser_config, denoiser_folders, denoiser_problem, pipeline_problem
from raycontrolnet.model.files import ModelFiles, local_files
from raycontrolnet.model.loading import BASE, VAE
from raycontrolnet.model.single_file_problems import single_file_problem
from raycontrolnet.storage.uri import is_uri, shown_name, shown_uri

CONTROLNET = "controlnet_model_name_or_path"
SINGLE_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
HUB_ADDRESS = "https://huggingface.co/"
SINGLE_FILES_OF = (BASE, CONTROLNET)
"""Settings whose models also come as single files."""


def model_path_problem(name: str, value: Any, flag: str | None = None) -> str | None:
    """Return a problem if the setting `name` is for a model, and `value` is a path with no model.

    Args:
        flag: the flag that gave `value`, if not `name`.
    """
    folders = FACTS[name].get("model_folders")
    if value is None or folders is None:
        return None
    start = f"--{flag or name}={shown_name(value)}: "
    if is_uri(value):
        return start + _address_advice(shown_uri(value), name)
    path = Path(value).expanduser()
    if path.is_file():
        problem = single_file_problem(path) if name == BASE and _is_alone(path) else file_advice(path, name)
        return start + problem if problem else None
    if path.is_dir():
        wanted = [denoiser_folders()] if name == BASE else []
        wanted += [(folder,) for folder in folders]
        missing = [" or ".join(names) for names in wanted if not any((path / each).is_dir() for each in names)]
        if not missing:
            return None
        kind = kind_problem(local_files(path)) if name == BASE else None
        return start + (kind or f"no {', '.join(missing)} in that folder; it must be in diffusers' layout")
    if value.lower().endswith(SINGLE_FILES):
        return f"{start}no such file, and not a Hub id (owner/name); correct the path"
    if not _is_hub_id(value):
        return f"{start}no such folder, and not the form of a Hub id (owner/name)"
    return None


def _address_advice(address: str, name: str) -> str:
    """Return what to do with an address, shown without keys, that is given for a model."""
    takes_file = name in SINGLE_FILES_OF and address.lower().endswith(SINGLE_FILES)
    if not address.startswith(HUB_ADDRESS):
        return f"must be a {'file' if takes_file else 'folder'} on a disk, or a Hub id; download it, and give its path"
    parts = address.removeprefix(HUB_ADDRESS).strip("/").split("/")
    hub_id, file = "/".join(parts[:2]), "/".join(parts[4:])  # after blob/main
    if takes_file and file:
        return f"is an address; run `hf download {hub_id} {file}`, and give the path that it prints"
    return f"is an address; give the Hub id: {hub_id}"


def file_advice(path: Path, name: str) -> str:
    """Return what to do with a file that is given for a model, which must be a folder."""
    if (path.parent / "model_index.json").is_file() or (name != BASE and (path.parent / "config.json").is_file()):
        return f"is a file; name the folder that it is in: {path.parent}"
    if name == BASE and (path.parent.parent / "model_index.json").is_file():
        return f"is a file of a part; name the model's folder: {path.parent.parent}"
    if path.suffix.lower() not in SINGLE_FILES or name not in (*SINGLE_FILES_OF, VAE):
        return "is a file; name the folder that it is in"
    if name == BASE:
        return "is pickled, which can hide code; convert it by the script in examples/guides/bases.md"
    if name == VAE:  # by itself it does not tell its scaling factor
        code = f"V.from_single_file('{path.name}', config='BASE', subfolder='vae').save_pretrained('{path.stem}')"
        start = "is a file; convert it by the BASE's configuration"
        return f'{start}: python -c "from diffusers import AutoencoderKL as V; {code}"'
    code = (
        f"from diffusers import ControlNetModel as C; C.from_single_file('{path.name}').save_pretrained('{path.stem}')"
    )
    return f'is a single-file checkpoint; convert it once, in its folder: python -c "{code}"'


def _is_alone(path: Path) -> bool:
    """Check that a file is a single-file base, and no part of a model in diffusers' layout."""
    return path.suffix.lower() == SAFETENSORS and not (path.parent.parent / "model_index.json").is_file()


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def kind_problem(files: ModelFiles) -> str | None:
    """Return why a base model cannot be trained, or which part it lacks, by its denoiser and its model_index.json."""
    problem = denoiser_problem(denoiser_config(files))
    return problem or pipeline_problem(files.read_json("model_index.json"), family_in(files))
