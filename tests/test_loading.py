"""Loading of models: weights that the libraries would draw at random are named; precision, paths, damaged files."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from reference import CPU, write_trained_controlnet
from safetensors.torch import load_file, save_file
from single_files import write_single_file

from raycontrolnet import GenerateConfig, generate
from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.components import Components, load_components
from raycontrolnet.model.problems import model_problems
from raycontrolnet.sampling.pipeline import DrawOptions, build_pipeline, draw

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


def test_the_unet_is_rounded_before_it_is_moved(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    to = UNet2DConditionModel.to

    def spy(self: UNet2DConditionModel, *arguments: object, **options: object) -> UNet2DConditionModel:
        if torch.device("meta") in arguments:
            moved.append(self.dtype)
        found: UNet2DConditionModel = to(self, *arguments, **options)
        return found

    monkeypatch.setattr(UNet2DConditionModel, "to", spy)
    model = ModelConfig(pretrained_model_name_or_path=str(tiny_base))
    load_components(model, device=torch.device("meta"), dtype=torch.bfloat16, seed=0)
    assert moved == [torch.bfloat16]


def test_half_precision_is_no_news(tiny_base: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ModelConfig(pretrained_model_name_or_path=str(tiny_base))
    load_components(model, device=CPU, dtype=torch.bfloat16, seed=0)
    assert "kept in float32" not in caplog.text


@pytest.mark.parametrize("name", ["input_blocks.0.0.weight", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"])
def test_a_weight_of_another_form(name: str, tiny_base: Path, tmp_path: Path) -> None:
    path = write_single_file(tiny_base, tmp_path / "base.safetensors")
    found = load_file(path)
    assert f"model.diffusion_model.{name}" in found
    save_file(found | {f"model.diffusion_model.{name}": torch.zeros(8)}, path)
    model = ModelConfig(pretrained_model_name_or_path=str(path), base_config=str(tiny_base))
    (problem,) = model_problems(model, None)
    assert problem.endswith("is no safetensors file, or damaged; download it anew")


@pytest.mark.parametrize("missing", ["shape", "dtype"])
def test_a_header_without_an_entry(missing: str, tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"x": {name: value for name, value in entry.items() if name != missing}}).encode()
    path = tmp_path / "base.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (problem,) = model_problems(ModelConfig(pretrained_model_name_or_path=str(path)), None)
    assert problem.endswith("is no safetensors file, or damaged; download it anew")


def test_paths_with_a_tilde(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As YAML has them, which no shell expands: for the base model, the VAE and the run's tokenizer."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(tiny_base, tmp_path / "base")
    controlnet = write_trained_controlnet(tiny_base, tmp_path)
    (controlnet / "config.yaml").write_text("tokenizer_name: ~/base/tokenizer\npretrained_model_name_or_path: ~/base\n")
    Image.new("RGB", (32, 32)).save(tmp_path / "control.png")
    config = GenerateConfig(
        controlnet=str(controlnet), pretrained_vae_model_name_or_path="~/base/vae", prompt=("a",), use_gpu=False,
        image=(str(tmp_path / "control.png"),), num_images=1, resolution=32, num_inference_steps=1,
        out=str(tmp_path / "out"),
    )  # fmt: skip
    (pair,) = generate(config, stream=io.StringIO())
    assert pair.images[0].is_file()


def test_a_half_precision_vae_that_overflows_is_decoded_with_in_fp32(tiny_xl_base: Path, tiny_base: Path) -> None:
    """If its configuration has force_upcast, as diffusers' pipeline does; autocast would undo that."""
    model = ModelConfig(
        pretrained_model_name_or_path=str(tiny_xl_base), pretrained_vae_model_name_or_path=str(tiny_base / "vae")
    )
    dtypes = []
    for upcasts in (True, False):
        components = load_components(model, device=CPU, dtype=torch.float16, seed=0)
        components.vae.register_to_config(force_upcast=upcasts)
        components.vae.decoder.conv_out.register_forward_hook(lambda *found: dtypes.append(found[2].dtype))
        options = DrawOptions(32, num_inference_steps=1, precision=torch.float16)
        control = Image.new("RGB", (32, 32))
        (image,) = draw(build_pipeline(components), components, ["a"], [control], [0], options)
        assert np.asarray(image).std() > 1
        assert components.vae.dtype == torch.float16
    assert dtypes == [torch.float32, torch.float16]
