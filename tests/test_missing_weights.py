"""Models that lack a weight, which the libraries would draw at random: named, with the part and the weight."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference import CPU, write_trained_controlnet
from safetensors.torch import load_file, save_file
from single_files import write_single_file

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.components import Components, load_components

OPEN_CLIP = "conditioner.embedders.1.model"
SINGLE = {
    ("sd1", "cond_stage_model.transformer.text_model.final_layer_norm.bias"): "text_encoder",
    ("sdxl", "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"): "text_encoder",
    ("sdxl", f"{OPEN_CLIP}.transformer.resblocks.0.mlp.c_fc.bias"): "text_encoder_2",
    ("sdxl", f"{OPEN_CLIP}.text_projection"): "text_encoder_2",
    ("sdxl", "first_stage_model.encoder.conv_in.bias"): "vae",
}
"""Layout and a weight of a single file -> the part that lacks it."""
FOLDERS = {
    ("text_encoder", "final_layer_norm.weight"),
    ("text_encoder_2", "text_projection.weight"),
    ("unet", "conv_in.bias"),
    ("vae", "decoder.conv_out.weight"),
}


def load(**names: Path) -> Components:
    model = ModelConfig(**{name: str(path) for name, path in names.items()})
    return load_components(model, device=CPU, dtype=torch.float32, seed=0)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    (file,) = folder.glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(ending: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def change(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        left = {name: value for name, value in found.items() if not name.endswith(ending)}
        assert len(left) == len(found) - 1
        return left

    return change


@pytest.mark.parametrize(("layout", "name"), SINGLE)
def test_single_files(layout: str, name: str, tiny_base: Path, tiny_xl_base: Path, tmp_path: Path) -> None:
    base = tiny_base if layout == "sd1" else tiny_xl_base
    path = write_single_file(base, tmp_path / "base.safetensors", layout)  # type: ignore[arg-type]
    found = load_file(path)
    del found[name]
    save_file(found, path)
    with pytest.raises(UserError, match=rf"cannot be loaded \({SINGLE[layout, name]}\): it lacks "):
        load(pretrained_model_name_or_path=path, base_config=base)


@pytest.mark.parametrize(("part", "name"), sorted(FOLDERS))
def test_folders(part: str, name: str, tiny_xl_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_xl_base, tmp_path / "base"))
    edit(base / part, without(name))
    with pytest.raises(UserError, match=rf"=\S+: cannot be loaded \({part}\): it lacks the weight \S*{name}"):
        load(pretrained_model_name_or_path=base)


def test_a_controlnet(tiny_base: Path, tmp_path: Path) -> None:
    controlnet = write_trained_controlnet(tiny_base, tmp_path)
    edit(controlnet, without("controlnet_mid_block.weight"))
    with pytest.raises(
        UserError, match=r"cannot be loaded: it lacks the weight controlnet_mid_block\.weight; download"
    ):
        load(pretrained_model_name_or_path=tiny_base, controlnet_model_name_or_path=controlnet)


def test_old_names_are_no_missing_weights(tiny_base: Path, tmp_path: Path) -> None:
    """As in files of Stable Diffusion 1.5, which both libraries convert."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def vae(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {}
        for name, value in found.items():
            new = next((name.replace(f".{now}.", f".{then}.") for now, then in old.items() if f".{now}." in name), name)
            renamed[new] = value
        assert renamed.keys() != found.keys()
        return renamed

    def text_encoder(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in found.items()}
        return names | {"text_model.embeddings.position_ids": torch.arange(77)[None]}

    edit(base / "vae", vae)
    edit(base / "text_encoder", text_encoder)
    one, other = (load(pretrained_model_name_or_path=folder) for folder in (tiny_base, base))
    for module, same in zip(one.frozen(), other.frozen(), strict=True):
        for value, equal in zip(module.parameters(), same.parameters(), strict=True):
            assert torch.equal(value, equal)
