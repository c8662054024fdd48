"""A base that is a single file in the original layout: the same results as of the folder."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from reference import CPU
from runs import Settings, equal, losses, metadata, run, weights
from single_files import cache, change, file, problem, write_single_file

from raycontrolnet import GenerateConfig, TrainConfig, generate
from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.config.train_config import changed_settings
from raycontrolnet.errors import UserError
from raycontrolnet.hub.model_card import write_model_card
from raycontrolnet.latents.vae_files import VaeFiles
from raycontrolnet.model.components import load_components
from raycontrolnet.model.problems import model_files
from raycontrolnet.model.size import controlnet_bytes_at_least

__all__ = ["cache", "change", "file"]  # fixtures


def test_a_run(file: Path, cache: Path, run_settings: Settings, validated_settings: Settings, tmp_path: Path) -> None:
    """Losses and weights are the folder's, bit for bit; so are those of a resumed run, and the images."""
    folder = run(validated_settings | {"num_validation_images": 1, "report_to": "none"}, tmp_path / "folder")
    link = tmp_path / "my-base.safetensors"
    shutil.copyfile(file, tmp_path / "blob")
    link.symlink_to(tmp_path / "blob")  # as in the Hub's cache
    changed = {"pretrained_model_name_or_path": str(link), "cache_dir": str(cache)}
    single = validated_settings | changed | {"num_validation_images": 1, "report_to": "none"}
    out = run(single, tmp_path / "single")
    assert losses(out) == losses(folder)
    assert equal(weights(out), weights(folder))
    images = [row["file_name"] for row in metadata(folder / "validation" / "step-000004")]
    assert len(images) == 2
    for name in images:
        places = [each / "validation" / "step-000004" / name for each in (out, folder)]
        assert Image.open(places[0]).tobytes() == Image.open(places[1]).tobytes()
    card = (out / "README.md").read_text()
    assert f"StableDiffusionControlNetPipeline.from_single_file('{link}', controlnet=controlnet)" in card

    shutil.rmtree(out / "checkpoint-4")
    run(single, out, resume_from_checkpoint="latest", validation_prompt=None, validation_image=None,
        control_fidelity=None)  # fmt: skip
    assert losses(out) == losses(folder)
    assert equal(weights(out), weights(folder))

    config = GenerateConfig(controlnet=str(out), prompt=("red circle",), image=single["validation_image"][:1], seed=7,
                            num_images=1, out=str(tmp_path / "drawn"), use_gpu=False)  # fmt: skip
    stream = io.StringIO()
    generate(config, stream=stream)
    assert f" on {link}, 1 pair" in stream.getvalue()
    drawn = Image.open(tmp_path / "drawn" / images[0])
    assert drawn.tobytes() == Image.open(folder / "validation" / "step-000004" / images[0]).tobytes()


@pytest.mark.parametrize("layout", ["sd1", "sd2", "sdxl"])
def test_layouts(layout: Any, tiny_base: Path, tiny_base_v: Path, tiny_xl_base: Path, tmp_path: Path) -> None:
    """All weights are the folder's, in 1.x, 2.x and XL; the prediction type is that of the configuration."""
    base = {"sd1": tiny_base, "sd2": tiny_base_v, "sdxl": tiny_xl_base}[layout]
    path = write_single_file(base, tmp_path / "base.safetensors", layout)
    assert problem(path, base_config=str(base)) is None
    one, other = (
        load_components(model, device=CPU, dtype=torch.float32, seed=0)
        for model in (
            ModelConfig(pretrained_model_name_or_path=str(base)),
            ModelConfig(pretrained_model_name_or_path=str(path), base_config=str(base)),
        )
    )
    assert one.family == other.family
    for module, same in zip((*one.frozen(), one.controlnet), (*other.frozen(), other.controlnet), strict=True):
        assert equal(module.state_dict(), same.state_dict())
        assert not same.training or same is other.controlnet
    assert other.noise_scheduler.config["prediction_type"] == ("v_prediction" if layout == "sd2" else "epsilon")


def test_half_precision(tiny_base: Path, tmp_path: Path) -> None:
    """A file in half precision, as most are, in the precision of training."""
    path = write_single_file(tiny_base, tmp_path / "half.safetensors", dtype=torch.float16)
    model = ModelConfig(pretrained_model_name_or_path=str(path), base_config=str(tiny_base))
    found = load_components(model, device=CPU, dtype=torch.bfloat16, seed=0)
    assert {value.dtype for module in found.frozen() for value in module.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in found.controlnet.parameters()} == {torch.float32}


def test_cached_latents(file: Path, tiny_base: Path, change: Callable[..., Path], run_settings: Settings,
                        tmp_path: Path) -> None:  # fmt: skip
    """They are those of the VAE in the file, and known by it alone."""
    cached = {"cache_latents": "on", "max_train_steps": 1}
    folder = run(run_settings | cached | {"latents_cache_dir": str(tmp_path / "one")}, tmp_path / "folder")
    settings = run_settings | cached | {"pretrained_model_name_or_path": str(file), "base_config": str(tiny_base)}
    out = run(settings | {"latents_cache_dir": str(tmp_path / "other")}, tmp_path / "single")
    assert losses(out) == losses(folder)

    def fingerprint(path: Path) -> str:
        model = ModelConfig(pretrained_model_name_or_path=str(path), base_config=str(tiny_base))
        return VaeFiles.find(model, None).fingerprint

    own = fingerprint(file)
    assert own == fingerprint(change(lambda found: found["model.diffusion_model.out.2.bias"].add_(1)))
    assert own != fingerprint(change(lambda found: found["first_stage_model.encoder.conv_in.bias"].add_(1)))


def test_every_node_must_see_the_file(file: Path, tiny_base: Path) -> None:
    model = ModelConfig(pretrained_model_name_or_path=str(file), base_config=str(tiny_base))
    assert {shared.setting: shared.paths for shared in model_files(model)} == {
        f"--pretrained_model_name_or_path={file}": (str(file),),
        f"--base_config={tiny_base}": (str(tiny_base / "unet" / "config.json"),),
    }
    gone = ModelConfig(pretrained_model_name_or_path="/gone/base.safetensors", base_config=str(tiny_base))
    with pytest.raises(UserError, match=r"=/gone/base.safetensors: the node \S+ does not see it"):
        load_components(gone, device=CPU, dtype=torch.float32, seed=0)


def test_room_is_known(file: Path, tiny_base: Path) -> None:
    single, folder = (controlnet_bytes_at_least(ModelConfig(pretrained_model_name_or_path=str(base)))
                      for base in (file, tiny_base))  # fmt: skip
    assert single == folder > 0


def test_the_model_card(tiny_base: Path, tmp_path: Path) -> None:
    """Its code loads the file; a pushed card names no folders of this machine."""
    file, pipeline = tmp_path / "my-base.safetensors", "StableDiffusionControlNetPipeline.from_single_file"
    given: Settings = {
        "pretrained_model_name_or_path": str(file),
        "base_config": str(tiny_base),
        "train_data_dir": "data",
    }
    settings = changed_settings(TrainConfig(**given))
    own = write_model_card(tmp_path, settings, {}).read_text()
    assert f"{pipeline}('{file}', controlnet=controlnet, config='{tiny_base}')" in own
    pushed = write_model_card(tmp_path, settings, {}, repo_id="someone/edges").read_text()
    assert f"{pipeline}('my-base.safetensors', controlnet=controlnet, config='{tiny_base.name}')" in pushed
    assert str(tiny_base.parent) not in pushed
