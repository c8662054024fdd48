"""Runs of Stable Diffusion XL: training, validation, cached latents, another VAE, and what they leave."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference_xl import controlnet_folder, load
from runs import Run, Settings, equal, lines, losses, run, train, weights

from raycontrolnet import GenerateConfig, generate
from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import ConfigError, RunError
from raycontrolnet.latents.vae_files import VaeFiles
from raycontrolnet.model.vae import load_vae
from raycontrolnet.quiet import only_errors
from raycontrolnet.sampling import images
from raycontrolnet.sampling.pipeline import DrawOptions

__all__ = ["controlnet_folder"]  # a fixture

RESOLUTION = 32


@pytest.fixture(scope="module")
def wide_circles(circles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the data with pictures of different sizes, none of them square."""
    folder = Path(shutil.copytree(circles, tmp_path_factory.mktemp("wide") / "circles"))
    for row in lines(folder / "metadata.jsonl"):
        for name in ("image", "conditioning_image"):
            number = int(Path(row[name]).stem)
            with Image.open(folder / row[name]) as picture:
                resized = picture.resize((40 + 3 * number, 36), Image.Resampling.BICUBIC)
            resized.save(folder / row[name])
    return folder


@pytest.fixture(scope="module")
def xl_settings(run_settings: Settings, tiny_xl_base: Path, wide_circles: Path) -> Settings:
    """Return settings of four updates with empty prompts, validation images and a held-out measure at every second."""
    return run_settings | {
        "pretrained_model_name_or_path": str(tiny_xl_base),
        "train_data_dir": str(wide_circles),
        "train_batch_size": 2,
        "lr_warmup_steps": 0,
        "proportion_empty_prompts": 0.3,
        "size_conditioning": "real",
        "validation_split": 3,
        "validation_steps": 2,
        "validation_prompt": ("red circle",),
        "validation_image": (str(wide_circles / "conditioning" / "00001.png"),),
        "num_validation_images": 1,
        "control_fidelity": "shape",
    }


@pytest.fixture(scope="module")
def xl_run(xl_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train. Do not write into its folder."""
    return train(xl_settings | {"output_dir": str(tmp_path_factory.mktemp("xl") / "run")})


def test_a_resumed_run_is_the_whole_run(xl_run: Run, xl_settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "resumed"
    run(xl_settings, out, max_train_steps=2)
    run(xl_settings, out, resume_from_checkpoint="latest")
    assert len(losses(out)) == 4
    assert losses(out) == losses(xl_run.folder)
    assert equal(weights(out), weights(xl_run.folder))
    for name in ("val_loss", "control_gap"):
        measured = [[line[name] for line in lines(folder / "validation.jsonl")] for folder in (out, xl_run.folder)]
        assert measured[0] == measured[1]
        assert len(measured[0]) == 2


def test_the_result_loads_in_diffusers(xl_run: Run, tiny_xl_base: Path) -> None:
    """And draws the run's last validation image, with the pipeline's own guidance."""
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline, UniPCMultistepScheduler

    folder = xl_run.folder / "validation" / "step-000004"
    (line,) = lines(folder / "metadata.jsonl")
    with only_errors():
        controlnet = ControlNetModel.from_pretrained(xl_run.folder)
        pipeline = StableDiffusionXLControlNetPipeline.from_pretrained(
            tiny_xl_base, controlnet=controlnet, add_watermarker=False
        )
        pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        image = pipeline(
            line["prompt"],
            image=Image.open(folder / line["conditioning_image_file_name"]),
            num_inference_steps=line["num_inference_steps"],
            generator=torch.Generator().manual_seed(line["seed"]),
        ).images[0]
    own = np.asarray(Image.open(folder / line["file_name"])).astype(int)
    assert np.abs(np.asarray(image) - own).max() <= 1  # convolutions round otherwise in another memory layout
    assert line["guidance_scale"] == 5.0
    assert 0 <= line["control_fidelity"] <= 1
    card = (xl_run.folder / "README.md").read_text()
    assert "StableDiffusionXLControlNetPipeline.from_pretrained(" in card
    assert "\n- stable-diffusion-xl\n" in card


def test_generate_draws_the_last_validation(xl_run: Run, xl_settings: Settings, tmp_path: Path) -> None:
    config = GenerateConfig(
        controlnet=str(xl_run.folder),
        prompt=xl_settings["validation_prompt"],
        image=xl_settings["validation_image"],
        num_images=1,
        out=str(tmp_path / "drawn"),
    )
    (pair,) = generate(config, stream=io.StringIO())
    validated = xl_run.folder / "validation" / "step-000004"
    assert pair.images[0].read_bytes() == (validated / "pair-00-image-00.png").read_bytes()
    assert pair.control.read_bytes() == (validated / "pair-00-control.png").read_bytes()


def test_half_precision_images_are_decoded_in_fp32(
    tiny_xl_base: Path, controlnet_folder: Path, xl_settings: Settings
) -> None:
    """Autocast, which the fp32 ControlNet needs, would run the VAE in half precision, in which SDXL's overflows."""
    pairs = [(xl_settings["validation_prompt"][0], xl_settings["validation_image"][0])]
    items = images.plan(pairs, 1, 0, "--image")
    drawn, dtypes = [], set()
    for dtype in (torch.float32, torch.bfloat16):
        components = load(tiny_xl_base, controlnet_folder, dtype)
        for name in ("conv_in", "conv_out"):
            layer = getattr(components.vae.decoder, name)
            layer.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
        options = DrawOptions(RESOLUTION, num_inference_steps=2, precision=dtype, interpolation="lanczos")
        drawn += [np.asarray(image).astype(float) for _, image in images.draw_items(components, items, options)]
    assert dtypes == {torch.float32}
    assert drawn[0].std() > 1
    assert np.abs(drawn[0] - drawn[1]).mean() < 3


def test_cached_latents_give_the_same_losses(xl_run: Run, xl_settings: Settings, tmp_path: Path) -> None:
    """With each image's own size, which the cache keeps."""
    cache = {"cache_latents": "on", "latents_cache_dir": str(tmp_path / "latents"), "latents_dtype": "float32"}
    out = run(xl_settings | cache, tmp_path / "cached")
    assert losses(out) == pytest.approx(losses(xl_run.folder), rel=1e-5)
    fixed = run(xl_settings | cache | {"size_conditioning": "fixed"}, tmp_path / "fixed")
    assert losses(fixed) != pytest.approx(losses(xl_run.folder), rel=1e-5)
    manifest = json.loads((tmp_path / "latents" / "manifest.json").read_text())
    assert manifest["encoding"]["interpolation"] == "lanczos"
    bilinear = {"image_interpolation_mode": "bilinear"}
    with pytest.raises(ConfigError, match=r"the cache there does not fit this run \(interpolation: lanczos, not bilin"):
        run(xl_settings | cache | bilinear, tmp_path / "bilinear")
    vae = {"pretrained_vae_model_name_or_path": str(write_other_vae(xl_settings, tmp_path / "vae"))}
    with pytest.raises(ConfigError, match=r"does not fit this run \(encoded by another VAE\)"):
        run(xl_settings | cache | vae, tmp_path / "vae_run")


def write_other_vae(settings: Settings, folder: Path, factor: float = 1.01) -> Path:
    """Write the base model's VAE with other weights."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(settings["pretrained_model_name_or_path"], subfolder="vae")
    with torch.no_grad():
        vae.quant_conv.weight *= factor
    vae.save_pretrained(folder)
    return folder


def test_a_named_vae_is_the_one_that_encodes(xl_run: Run, xl_settings: Settings, tmp_path: Path) -> None:
    """From pixels and from the cache; it need not have the base model's variant."""
    vae = write_other_vae(xl_settings, tmp_path / "vae")
    names = {"pretrained_model_name_or_path": "someone/base", "pretrained_vae_model_name_or_path": str(vae)}
    with_variant = ModelConfig(**names, variant="fp16")
    assert load_vae(with_variant, dtype=torch.float16).dtype == torch.float16
    assert VaeFiles.find(with_variant, None) == VaeFiles.find(ModelConfig(**names), None)
    named = {"pretrained_vae_model_name_or_path": str(vae), "max_train_steps": 1, "validation_steps": 100}
    for name in ("validation_prompt", "validation_image", "control_fidelity"):
        named[name] = None
    out = run(xl_settings, tmp_path / "pixels", **named)
    assert losses(out)[0] != losses(xl_run.folder)[0]
    cache = {"cache_latents": "on", "latents_cache_dir": str(tmp_path / "latents"), "latents_dtype": "float32"}
    assert losses(run(xl_settings | cache, tmp_path / "cached", **named)) == pytest.approx(losses(out), rel=1e-5)
    broken = write_other_vae(xl_settings, tmp_path / "broken", float("inf"))
    named |= {"pretrained_vae_model_name_or_path": str(broken), "mixed_precision": "bf16"}
    with pytest.raises(RunError, match="The VAE gives latents that are not finite in bfloat16 for ") as error:
        run(xl_settings, tmp_path / "nan", **named)
    assert "leave out --pretrained_vae_model_name_or_path: the base model's own runs in fp32; or " in str(error.value)
