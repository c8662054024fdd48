"""Problems with the models that settings name, found without reading weights: before Ray, latents and training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from raycontrolnet.cluster.shared_files import SharedFiles
from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.config.train_config import names_with
from raycontrolnet.model import kinds
from raycontrolnet.model.base_family import family_in
from raycontrolnet.model.families.registry import (
    controlnet_classes,
    denoiser_configs,
    families,
    family_of,
    family_or_first,
)
from raycontrolnet.model.files import (
    LFS_POINTER,
    SCHEDULER_CONFIG,
    ModelFiles,
    NotKnown,
    NotThere,
    Unreachable,
    hub_files,
    local_files,
)
from raycontrolnet.model.loading import BASE, VAE
from raycontrolnet.model.paths import CONTROLNET, kind_problem, model_path_problem
from raycontrolnet.model.single_file import BASE_CONFIG, NotABase, base_files, is_single_file
from raycontrolnet.model.single_file_problems import single_file_config
from raycontrolnet.text import error_message

TOKENIZER = "tokenizer_name"
MAIN_FILES = {VAE: "config.json", CONTROLNET: "config.json", TOKENIZER: "tokenizer_config.json"}
"""Setting -> a file that its model has, for models besides the base whose files are looked at."""
VAE_CLASSES = ("AutoencoderKL",)
BASE_VAE_CONFIG = "vae/config.json"
ORIGINAL_SCALING_FACTOR = 0.18215
"""diffusers' value for a VAE whose configuration has none: the first ones were written without."""


class _Unsuitable(Exception):
    """A model that cannot be used; the message says why."""


def model_problems(
    model: ModelConfig, token: str | None, *, elsewhere: bool = False, controlnet_flag: str = CONTROLNET
) -> Iterator[str]:
    """Yield a problem for each model that is not there, not complete, or of a kind that cannot be trained.

    Args:
        model: names the models.
        token: for private models on the Hub.
        elsewhere: other machines load the models, and may reach the Hub where this one does not.
        controlnet_flag: the flag that names the ControlNet, for messages.
    """
    configs: dict[str, dict[str, Any]] = {}
    for name in names_with("model_folders"):
        flag, value = controlnet_flag if name == CONTROLNET else name, getattr(model, name)
        if not value:
            continue
        if problem := model_path_problem(name, value, flag):
            yield problem
        elif name == BASE_CONFIG and not is_single_file(model.pretrained_model_name_or_path):
            yield f"--{BASE_CONFIG}={value}: is for a base model that is a single file; leave it out"
        elif name in _PROBLEMS and not (name == BASE and model_path_problem(BASE_CONFIG, model.base_config)):
            try:
                configs[name] = _checked_config(name, value, model, token, elsewhere=elsewhere)
            except _Unsuitable as error:
                yield f"--{flag}={value}: {error}"
    if problem := mismatch(configs.get(CONTROLNET, {}), configs.get(BASE, {})):
        yield f"--{controlnet_flag}={model.controlnet_model_name_or_path}: {problem}"
    channels, base = configs.get(VAE, {}).get("latent_channels"), configs.get(BASE, {})
    family = family_or_first(base)
    if None not in (channels, taken := family.latent_channels(base)) and channels != taken:
        problem = f"its latents have {channels} channels, the base model's {family.denoiser_title} takes {taken}"
        yield _other_vae(model, problem)
    elif base and configs.get(VAE) and (problem := vae_mismatch(configs[VAE], _own_vae(model, token))):
        yield _other_vae(model, problem)


def _other_vae(model: ModelConfig, problem: str) -> str:
    return f"--{VAE}={model.pretrained_vae_model_name_or_path}: {problem}; name a VAE of the base model's family"


def _own_vae(model: ModelConfig, token: str | None) -> dict[str, Any]:
    """Return the configuration of the base model's own VAE; empty if it has none, or it cannot be had now."""
    with suppress(NotABase, NotKnown, NotThere, OSError):
        return base_files(model, token, (BASE_VAE_CONFIG,), from_cache=True).read_json(BASE_VAE_CONFIG)
    return {}


def vae_mismatch(vae: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """Return why a VAE's latents are not those of the base model's own, by their configurations; None if they may be.

    Shapes may agree all the same, and training would go on with latents that the base model does not know.
    """
    for name, titled in (
        ("pixels", "one latent for {:g} x {:g} pixels"), ("scaling_factor", "scaling_factor {:g}"),
        ("shift_factor", "shift_factor {:g}"),
    ):  # fmt: skip
        one, other = (_latents_of(config).get(name) for config in (vae, own))
        if None not in (one, other) and one != other:
            given, wanted = (titled.format(value, value) for value in (one, other))
            return f"it has {given}, the base model's own VAE {wanted}"
    return None


def _latents_of(config: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a VAE's latents; empty if its configuration is not known."""
    if not config:
        return {}
    blocks = config.get("block_out_channels")
    return {
        "scaling_factor": config.get("scaling_factor") or ORIGINAL_SCALING_FACTOR,
        "shift_factor": config.get("shift_factor") or 0.0,
        **({"pixels": 2 ** (len(blocks) - 1)} if blocks else {}),
    }


def model_files(model: ModelConfig) -> Iterator[SharedFiles]:
    """Yield a file of each local model, which every machine must see that loads it."""
    for name in (*_PROBLEMS, BASE_CONFIG):
        value = getattr(model, name)
        if value and Path(value).is_absolute():
            files = [value] if is_single_file(value) else [str(Path(value, file)) for file in _main_files(name)]
            yield SharedFiles.of(f"--{name}={value}", files)


def _main_files(name: str) -> tuple[str, ...]:
    """Return files of which the model that the setting `name` gives has one."""
    return (MAIN_FILES[name],) if name in MAIN_FILES else denoiser_configs()


def mismatch(controlnet: Mapping[str, Any], denoiser: Mapping[str, Any]) -> str | None:
    """Return why a ControlNet does not fit the base model's denoiser, by their configurations; None if it may."""
    one, other = (family_of(config) if config else None for config in (controlnet, denoiser))
    if one and other and one.name != other.name:
        return f"made for another family of base models ({one.title}; the base model is {other.title})"
    family = other or one or families()[0]
    for name in family.shared_config:
        own, wanted = (_listed(config.get(name)) for config in (controlnet, denoiser))
        if None not in (own, wanted) and own != wanted:
            return f"made for another base model ({name} {own}, the base model's {family.denoiser_title} has {wanted})"
    return None


def _listed(value: Any) -> Any:
    """Return a tuple as a list, which it becomes in a file."""
    return list(value) if isinstance(value, tuple) else value


def _convert_command(cls: str, name: str, variant: str | None = None) -> str:
    """Return the command that makes the pickled weights of a model in diffusers' layout safetensors."""
    shown, options = Path(name).name if Path(name).is_dir() else name, f", variant='{variant}'" if variant else ""
    copy = f"{shown.rpartition('/')[2]}-safetensors"
    code = f"from diffusers import {cls} as C; C.from_pretrained('{shown}'{options}).save_pretrained('{copy}')"
    return f'python -c "{code}"'


def _checked_config(name: str, value: str, model: ModelConfig, token: str | None, *, elsewhere: bool) -> dict[str, Any]:
    """Return the main file of a model; empty if it is not known yet.

    Raises:
        _Unsuitable: with what is wrong with the model.
    """
    revision = None if name == CONTROLNET else model.revision
    folder = Path(value).expanduser()
    try:
        if name == BASE and is_single_file(value):
            return single_file_config(model, token, elsewhere=elsewhere)
        if folder.is_dir():
            files = local_files(folder)
        else:
            files = hub_files(value, _main_files(name), revision=revision, cache_dir=model.cache_dir, token=token)
        problem = _PROBLEMS[name](files, model)
        config = next((found for file in _main_files(name) if (found := files.read_json(file))), {})
    except NotKnown:
        return {}
    except Unreachable as error:
        if elsewhere and not folder.parent.is_dir():
            return {}
        raise _Unsuitable(str(error)) from None
    except (NotThere, NotABase) as error:
        raise _Unsuitable(str(error)) from None
    except OSError as error:
        raise _Unsuitable(f"cannot be read ({error_message(error, 80)})") from None
    if problem:
        raise _Unsuitable(problem)
    return config


def _base_problem(files: ModelFiles, model: ModelConfig) -> str | None:
    names, family, problem = files.names, family_in(files), kind_problem(files)
    if names is not None and names.isdisjoint(denoiser_configs()):
        return problem or f"has no {' or '.join(denoiser_configs())}; a base model must be in diffusers' layout"
    if problem := problem or family.scheduler_problem(files.read_json(SCHEDULER_CONFIG)):
        return problem
    convert = _convert_command("DiffusionPipeline", model.pretrained_model_name_or_path, model.variant)
    for part in family.part_classes if names is not None else ():
        problem = kinds.weights_problem(names or (), part, model.variant, convert, variant_flag=True)
        if problem := problem or _pointer(files, part):
            return problem
    for folder in family.tokenizers if names is not None else ():
        replaced = model.tokenizer_name is not None and folder == family.tokenizers[0]
        if not replaced and not any(name.startswith(f"{folder}/") for name in names or ()):
            advice = ", or give --tokenizer_name" if folder == family.tokenizers[0] else ""
            return f"has no {folder}; add that folder{advice}"
    return None


def _controlnet_problem(files: ModelFiles, model: ModelConfig) -> str | None:
    names = files.names
    if names is not None and "config.json" not in names:
        inside = "controlnet/config.json" in names
        return "name the folder controlnet in it" if inside else "has no config.json; it must be in diffusers' layout"
    classes = controlnet_classes()
    kind = files.read_json("config.json").get("_class_name", classes[0])
    if kind not in classes:
        return f"holds a {kind}, not a {' or '.join(classes)}"
    if names is None:
        return None
    convert = _convert_command(kind, model.controlnet_model_name_or_path or "")
    return kinds.weights_problem(names, "", None, convert, variant_flag=False) or _pointer(files, "")


def _vae_problem(files: ModelFiles, model: ModelConfig) -> str | None:
    names = files.names
    if names is not None and "config.json" not in names:
        inside = "vae/config.json" in names
        return "name the folder vae in it" if inside else "has no config.json; a VAE must be in diffusers' layout"
    kind = files.read_json("config.json").get("_class_name", VAE_CLASSES[0])
    if kind not in VAE_CLASSES:
        return f"holds a {kind}, not an {VAE_CLASSES[0]}"
    if names is None:
        return None
    variant = model.variant if model.variant and any(f".{model.variant}." in name for name in names) else None
    convert = _convert_command(VAE_CLASSES[0], model.pretrained_vae_model_name_or_path or "", model.variant)
    return kinds.weights_problem(names, "", variant, convert, variant_flag=True) or _pointer(files, "")


def _tokenizer_problem(files: ModelFiles, _: ModelConfig) -> str | None:
    names = files.names
    if names is None or names & {"vocab.json", "tokenizer.json"}:
        return None
    inside = any(name.startswith("tokenizer/") for name in names)
    return "name the folder tokenizer in it" if inside else "has no vocab.json; it must hold a CLIP tokenizer"


_PROBLEMS = {BASE: _base_problem, VAE: _vae_problem, CONTROLNET: _controlnet_problem, TOKENIZER: _tokenizer_problem}


def _pointer(files: ModelFiles, part: str) -> str | None:
    """Return a problem if a local part's weights are what `git clone` leaves without git-lfs."""
    if files.folder is None:
        return None
    for path in (files.folder / part).glob("*.safetensors"):
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                return f"{part or path.name} holds a Git LFS pointer, not weights; run `git lfs pull` in that folder"
    return None
