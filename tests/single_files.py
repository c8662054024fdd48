"""A tiny base in diffusers' layout as one file in the original layout, which diffusers' converters undo."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.model.problems import model_problems

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = {
    "sd1": "cond_stage_model.transformer.text_model.",
    "sd2": "cond_stage_model.model.",
    "sdxl": "conditioner.embedders.0.transformer.text_model.",
}
RENAMED = {
    r"time_embedding\.linear_1": "time_embed.0", r"time_embedding\.linear_2": "time_embed.2",
    r"add_embedding\.linear_1": "label_emb.0.0", r"add_embedding\.linear_2": "label_emb.0.2",
    r"^conv_in": "input_blocks.0.0", r"^conv_norm_out": "out.0", r"^conv_out": "out.2",
    r"mid_block\.resnets\.0": "middle_block.0", r"mid_block\.attentions\.0": "middle_block.1",
    r"mid_block\.resnets\.1": "middle_block.2",
    r"\.norm1\.(?=\w+$)": ".in_layers.0.", r"\.conv1\.": ".in_layers.2.", r"\.norm2\.(?=\w+$)": ".out_layers.0.",
    r"\.conv2\.": ".out_layers.3.", r"time_emb_proj": "emb_layers.1", r"conv_shortcut": "skip_connection",
}  # fmt: skip
"""Parts of names of the UNet: diffusers' -> the original ones."""
VAE_RENAMED = {
    r"down_blocks\.(\d+)\.resnets": r"down.\1.block", r"down_blocks\.(\d+)\.downsamplers\.0": r"down.\1.downsample",
    r"mid_block\.resnets\.0": "mid.block_1", r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1", r"group_norm": "norm", r"\.to_([qkv])\.": r".\1.",
    r"to_out\.0": "proj_out", r"conv_norm_out": "norm_out", r"conv_shortcut": "nin_shortcut",
}  # fmt: skip
OPEN_CLIP = {
    r"^encoder\.layers\.": "transformer.resblocks.", r"layer_norm1": "ln_1", r"layer_norm2": "ln_2",
    r"\.fc1\.": ".c_fc.", r"\.fc2\.": ".c_proj.", r"self_attn": "attn", r"^final_layer_norm": "ln_final",
    r"^embeddings\.token_embedding\.weight": "token_embedding.weight",
    r"^embeddings\.position_embedding\.weight": "positional_embedding",
}  # fmt: skip


def write_single_file(
    base: Path, path: Path, layout: Literal["sd1", "sd2", "sdxl"] = "sd1", *, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the weights of the model in the folder `base` to the file `path`, and return it."""
    layers = json.loads((base / "unet" / "config.json").read_text())["layers_per_block"]
    weights = dict(_unet(_read(base / "unet"), layers)) | dict(_vae(_read(base / "vae")))
    text = {name.removeprefix("text_model."): value for name, value in _read(base / "text_encoder").items()}
    weights |= dict(_open_clip(text, CLIP[layout]) if layout == "sd2" else _prefixed(text, CLIP[layout]))
    if layout == "sdxl":
        second = {name.removeprefix("text_model."): value for name, value in _read(base / "text_encoder_2").items()}
        weights |= dict(_open_clip(second, "conditioner.embedders.1.model."))
    saved = {name: value.to(dtype).contiguous() for name, value in weights.items()}
    # What such files have besides.
    saved |= {
        "alphas_cumprod": torch.ones(1000),
        "model_ema.decay": torch.ones(()),
        "model_ema.num_updates": torch.ones(()),
    }
    if layout == "sd1":
        saved[f"{CLIP[layout]}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(saved, path)
    return path


def _read(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def _prefixed(weights: dict[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    return ((f"{prefix}{name}", value) for name, value in weights.items())


def _renamed(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = re.sub(old, new, name)
    return name


def _unet(weights: dict[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
    attention = {name.split(".")[1] for name in weights if re.match(r"up_blocks\.\d+\.attentions", name)}

    def place(match: re.Match[str]) -> str:
        direction, block, part, index = match.groups()
        if direction == "down":
            number = 1 + int(block) * (layers + 1) + (layers if part == "downsamplers" else int(index))
            inner = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[part]
            return f"input_blocks.{number}.{inner}"
        number = int(block) * (layers + 1) + (layers if part == "upsamplers" else int(index))
        upsampler = f"{2 if block in attention else 1}.conv"
        inner = {"resnets": "0", "attentions": "1", "upsamplers": upsampler}[part]
        return f"output_blocks.{number}.{inner}"

    parts = r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)(?:\.conv(?=\.\w+$))?"
    for name, value in weights.items():
        in_attention = ".attentions." in name  # whose own norms keep their names
        table = {old: new for old, new in RENAMED.items() if not (in_attention and "norm" in old)}
        moved = re.sub(parts, place, name)
        yield UNET + _renamed(moved, table), value


def _vae(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    levels = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("decoder.up_blocks."))

    def up(match: re.Match[str]) -> str:
        block, part, rest = levels - 1 - int(match[1]), match[2], match[3]
        return f"up.{block}.block.{rest}" if part == "resnets" else f"up.{block}.upsample"

    for name, value in weights.items():
        moved = re.sub(r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)", up, name)
        linear = ".attentions." in name and value.dim() == 2  # a convolution of one pixel
        yield VAE + _renamed(moved, VAE_RENAMED), value[:, :, None, None] if linear else value


def _open_clip(weights: dict[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in weights.items():
        if ".q_proj." in name:  # query, key and value are one there
            three = torch.cat([weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            ending = ".in_proj_weight" if name.endswith("weight") else ".in_proj_bias"
            yield prefix + _renamed(name.partition(".q_proj.")[0], OPEN_CLIP) + ending, three
        elif name == "text_projection.weight":
            yield f"{prefix}text_projection", value.T
        elif ".k_proj." not in name and ".v_proj." not in name:
            yield prefix + _renamed(name, OPEN_CLIP), value


# --- for the tests of such bases ---

ORIGINAL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
LONGEST_LINE = 250
TOKEN = "hf_TheRightToken"


@pytest.fixture(scope="module")
def file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny base as a single file. Do not write into its folder."""
    return write_single_file(tiny_base, tmp_path_factory.mktemp("single") / "my-base.safetensors")


@pytest.fixture(scope="module")
def cache(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the Hub's cache with the original's small files, which here are the tiny base's."""
    folder = tmp_path_factory.mktemp("hub")
    model = folder / f"models--{ORIGINAL.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tiny_base, model / "snapshots" / ("a" * 40), ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture
def change(file: Path, tmp_path: Path) -> Callable[..., Path]:
    """change(...): the file with other weights."""

    def change(edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        found = load_file(file)
        edit(found)
        save_file(found, tmp_path / "changed.safetensors")
        return tmp_path / "changed.safetensors"

    return change


def problem(path: Path, **settings: Any) -> str | None:
    """Return the one problem of a single-file base, without the flag and the value."""
    found = list(model_problems(ModelConfig(pretrained_model_name_or_path=str(path), **settings), TOKEN))
    assert len(found) <= 1
    if not found:
        return None
    start = f"--pretrained_model_name_or_path={path}: "
    assert found[0].startswith(start)
    assert len(found[0]) - len(str(path)) - len(str(settings.get("base_config", ""))) <= LONGEST_LINE
    assert "\n" not in found[0]
    return found[0].removeprefix(start)
