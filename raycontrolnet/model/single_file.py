"""A base model as one .safetensors file in the original layout: its kind, by its header; weights are not read.

The file has the weights alone. Configurations and tokenizer are those of a model in diffusers' layout: of
`--base_config`, or else of the model that such files come from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from raycontrolnet.config.output_settings import SAFETENSORS
from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.model.files import (
    LFS_POINTER,
    SMALL_FILES,
    ModelFiles,
    cached_files,
    hub_files,
    local_files,
)
from raycontrolnet.model.kinds import BY_INPUT_CHANNELS
from raycontrolnet.model.layout import Layout

BASE_CONFIG = "base_config"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
"""Beginnings of the names of weights, as in the original layout."""
CONV_IN = f"{UNET}input_blocks.0.0.weight"
TO_KEYS = "attn2.to_k.weight"
LONGEST_HEADER = 100_000_000
"""Bytes; safetensors reads no longer ones."""


class NotABase(Exception):
    """A file that is no base model that can be trained; the message says what it is."""


OTHERS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("lora_unet_", "lora_te", "lora_transformer", "lycoris_"), "a LoRA"),
    (("control_model.", "controlnet_cond_embedding.", "input_hint_block.", "lora_controlnet", "controlnet_"),
     "a ControlNet"),
    (("ip_adapter.", "image_proj."), "an IP-Adapter"),
    (("adapter.body.", "body."), "a T2I-Adapter"),
    (("emb_params", "string_to_param", "clip_l", "clip_g", "<"), "a textual inversion"),
    (("double_blocks.", f"{UNET}double_blocks."), "a Flux model"),
    (("joint_blocks.", f"{UNET}joint_blocks."), "a Stable Diffusion 3 model"),
    (("conditioner.embedders.0.model.",), "an SDXL refiner, which only finishes images"),
)  # fmt: skip
"""Beginnings of weights' names -> what such a file is, if it has no family's layout."""
MARKED = ((("edm_mean",), "a Playground v2.5 model"),)
"""The same for files that may have a family's layout all the same."""
ALONE: tuple[tuple[tuple[str, ...], str], ...] = (
    (("down_blocks.", "up_blocks.", "input_blocks."), "a UNet alone"),
    ((UNET, "transformer_blocks.", "single_transformer_blocks.", "blocks."), "a model of another family"),
    (("encoder.", "decoder.", VAE, "quant_conv."), "a VAE alone"),
    (("text_model.", "transformer.text_model.", "cond_stage_model.", "conditioner."), "a text encoder alone"),
)
"""The same for files without a UNet in the original layout."""
LORA_PARTS = (".lora_", "lora_A.", "lora_B.", "lora.up.", "lora.down.", ".hada_w", ".lokr_w")


def is_single_file(name: str | None) -> bool:
    """Check that `name` is the path of a single file, which need not be there: not a folder, nor a Hub id."""
    return name is not None and name.lower().endswith(SAFETENSORS) and not Path(name).expanduser().is_dir()


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Read the names, types and shapes of the weights in a file, as safetensors has them.

    Raises:
        NotABase: if it is no whole safetensors file.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if start == LFS_POINTER[:8]:
            raise NotABase("is a Git LFS pointer, not weights; run `git lfs pull` in its folder")
        length = int.from_bytes(start, "little")
        content = file.read(length) if length <= LONGEST_HEADER else b""
    try:
        header = json.loads(content)
        header.pop("__metadata__", None)
        end = 8 + length + max(entry["data_offsets"][1] for entry in header.values())
        if not all(isinstance(entry["dtype"], str) and isinstance(entry["shape"], list) for entry in header.values()):
            raise ValueError
        matrices = [entry for name, entry in header.items() if name == CONV_IN or name.endswith(TO_KEYS)]
        if any(len(entry["shape"]) < 2 for entry in matrices):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise NotABase("is no safetensors file, or damaged; download it anew") from None
    if path.stat().st_size < end:
        raise NotABase("is cut short; download it anew")
    return dict(header)


def layout_of(header: Mapping[str, Mapping[str, Any]], *, with_vae: bool = True) -> Layout:
    """Return the layout of the base model with these weights.

    Args:
        header: of `read_header`.
        with_vae: whether the VAE is taken from it.

    Raises:
        NotABase: if it is something else, by the names and shapes of its weights.
    """
    from raycontrolnet.model.families.registry import families  # which import this module

    if any(part in name for name in header for part in LORA_PARTS):
        raise NotABase(_only_bases("a LoRA"))
    known = ((family, layout) for family in families() for layout in family.layouts)
    found = (both for both in known if all(name in header for name in both[1].text_weights))
    family, layout = next(found, (None, None))
    kind = _first(MARKED if layout else (*OTHERS, *MARKED), header)
    if kind := kind or (family.kind_of_file(header) if family else kind_of_file(header)):
        raise NotABase(_only_bases(kind))
    if layout is None:
        raise NotABase("has no text encoder that diffusers finds; take the whole checkpoint, with text encoder and VAE")
    if with_vae and not any(name.startswith(VAE) for name in header):
        raise NotABase("has no VAE; take the whole checkpoint, or name one with --pretrained_vae_model_name_or_path")
    return layout


def kind_of_file(header: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the kind of a file without the UNet of a text-to-image base in the original layout; None if it has it."""
    if CONV_IN not in header:
        return _first(ALONE, header) or "no base model in the original layout (its weights have other names)"
    if (channels := header[CONV_IN]["shape"][1]) != 4:
        return f"{BY_INPUT_CHANNELS.get(channels, 'a model of another family')} (UNet with {channels} input channels)"
    return None


def _only_bases(kind: str) -> str:
    return f"is {kind}; only whole text-to-image checkpoints of Stable Diffusion 1.x, 2.x and XL can be read"


def _first(kinds: Iterable[tuple[tuple[str, ...], str]], names: Iterable[str]) -> str | None:
    """Return the first kind of which a weight is there."""
    names = list(names)
    return next((kind for starts, kind in kinds if any(name.startswith(starts) for name in names)), None)


def predicts_velocity(header: Mapping[str, Any]) -> bool:
    """Check for the mark that UIs and trainers leave in files of models that predict the velocity."""
    return "v_pred" in header


def config_place(model: ModelConfig) -> str:
    """Return the folder or Hub id with the configurations of a single-file base.

    Raises:
        NotABase: as `read_header` and `layout_of`.
        OSError: if it cannot be read.
    """
    if model.base_config:
        return model.base_config
    header = read_header(Path(model.pretrained_model_name_or_path).expanduser())
    return layout_of(header, with_vae=model.pretrained_vae_model_name_or_path is None).configured_as


def base_files(
    model: ModelConfig, token: str | None, main_files: Sequence[str], *, from_cache: bool = False
) -> ModelFiles:
    """Return the files of the base model, or those with the configurations of a single-file base.

    Args:
        model: names the base model.
        token: for private models on the Hub.
        main_files: one of these it has.
        from_cache: do not ask the Hub if its cache has such a file.

    Raises:
        NotABase, NotThere, Unreachable, NotKnown, OSError: as `hub_files` and `config_place`.
    """
    single = is_single_file(model.pretrained_model_name_or_path)
    place = config_place(model) if single else model.pretrained_model_name_or_path
    if (folder := Path(place).expanduser()).is_dir():
        return local_files(folder)
    revision = None if single else model.revision
    cached = cached_files(place, revision=revision, cache_dir=model.cache_dir)
    if from_cache and cached.find_one(main_files) is not None:
        return cached
    return hub_files(place, main_files, revision=revision, cache_dir=model.cache_dir, token=token)


def config_folder(model: ModelConfig, token: str | None) -> str:
    """Return the local folder with the configurations of a single-file base, downloaded if needed.

    Raises:
        NotABase, OSError: as `config_place`; LocalEntryNotFoundError is one.
    """
    place = config_place(model)
    return place if Path(place).is_dir() else _downloaded(place, model.cache_dir, token)


@lru_cache(maxsize=4)
def _downloaded(name: str, cache_dir: str | None, token: str | None) -> str:
    from huggingface_hub import snapshot_download

    from raycontrolnet.model.families.registry import denoiser_configs

    try:
        return snapshot_download(name, cache_dir=cache_dir, token=token, allow_patterns=list(SMALL_FILES))
    except OSError:  # offline, also where small files are missing that nothing needs
        found = cached_files(name, revision=None, cache_dir=cache_dir).find_one(denoiser_configs())
        if found is None:
            raise
        return str(found.parents[1])


def download_command(name: str) -> str:
    """Return the shell command that downloads configurations and tokenizer of a model on the Hub."""
    return " ".join([f"hf download {name}", *(f"--include '{pattern}'" for pattern in SMALL_FILES)])


def unet_problem(config: Mapping[str, Any], header: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return why the file's UNet is not that of the configuration; None if it may be."""
    widths = [entry["shape"][1] for name, entry in header.items()
              if name.startswith(UNET) and name.endswith(TO_KEYS)]  # fmt: skip
    (first, *_), crossed = config.get("block_out_channels") or (None,), config.get("cross_attention_dim")
    for name, own, theirs in (
        ("block_out_channels", first, header[CONV_IN]["shape"][0]),
        ("cross_attention_dim", crossed, widths[0] if widths else None),
    ):
        if None not in (own, theirs) and own != theirs:
            return f"is of another model (its UNet's {name}: {own}, the file's: {theirs})"
    return None


def weights_of(header: Mapping[str, Mapping[str, Any]], start: str) -> dict[str, Mapping[str, Any]]:
    """Return the entries of the weights whose names begin with `start`, in the order of the file."""
    found = {name: entry for name, entry in header.items() if name.startswith(start)}
    return dict(sorted(found.items(), key=lambda item: item[1]["data_offsets"]))
