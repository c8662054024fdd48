"""Stable Diffusion XL: the arithmetic of diffusers' script, and all that a run does."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from base_model import write_random_xl_base
from PIL import Image
from reference import CPU, LATENT_SHAPE, draw_timestep, fake_rows, steps, training, write_trained_controlnet
from reference_xl import encode_prompt, reference_loss
from runs import Run, Settings, equal, lines, losses, run, train, weights

from raycontrolnet import GenerateConfig, generate
from raycontrolnet.config.settings import INTERPOLATION_MODES, ModelConfig
from raycontrolnet.data.records import PreparedRow
from raycontrolnet.data.size_conditioning import SizeConditioning
from raycontrolnet.data.transforms import resize_and_crop
from raycontrolnet.errors import ConfigError, RunError
from raycontrolnet.latents.vae_files import VaeFiles
from raycontrolnet.model.components import Components, load_components
from raycontrolnet.model.families.stable_diffusion_xl import StableDiffusionXL
from raycontrolnet.model.step import controlnet_loss, draw, make_batch
from raycontrolnet.model.vae import load_vae
from raycontrolnet.quiet import only_errors
from raycontrolnet.sampling import images
from raycontrolnet.sampling.pipeline import DrawOptions

RESOLUTION = 32
CAPTIONS = ["red circle with blue background", "", "green square"]


@pytest.fixture(scope="module")
def controlnet_folder(tiny_xl_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_controlnet(tiny_xl_base, tmp_path_factory.mktemp("controlnet"))


def load(base: Path, controlnet: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Components:
    names = {"pretrained_model_name_or_path": str(base), "controlnet_model_name_or_path": str(controlnet)}
    return load_components(ModelConfig(**names | settings), device=CPU, dtype=dtype, seed=0)


@pytest.fixture(scope="module")
def components(tiny_xl_base: Path, controlnet_folder: Path) -> Components:
    return load(tiny_xl_base, controlnet_folder)


def rows() -> list[PreparedRow]:
    return [replace(row, prompt=prompt) for row, prompt in zip(fake_rows(0, 1, 2), CAPTIONS, strict=True)]


def time_ids(prepared: list[PreparedRow]) -> torch.Tensor:
    return torch.tensor([row.size_conditions for row in prepared])


# --- the step ---


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_scripts(
    prediction_type: Any, tiny_xl_base: Path, controlnet_folder: Path, components: Components, tmp_path: Path
) -> None:
    """To 1e-6; with other sizes, another pooled caption, or other hidden states it is another."""
    base = tiny_xl_base
    if prediction_type != "epsilon":
        base = write_random_xl_base(tmp_path / "base", prediction_type=prediction_type)
        components = load(base, controlnet_folder)
    draws, prepared = draw(0, [0, 1, 2], LATENT_SHAPE, draw_timestep, CPU), rows()
    batch = make_batch(prepared, components, CPU)
    with torch.no_grad():
        expected = reference_loss(base, controlnet_folder, prepared, draws, time_ids(prepared))
        found = controlnet_loss(components, components.controlnet, batch, draws)
        assert found.dtype == torch.float32
        assert abs(float(found.mean() - expected)) <= 1e-6
        assert expected > 0.1, "a loss near zero would agree with anything"
        for wrong in (
            reference_loss(base, controlnet_folder, prepared, draws, time_ids(prepared) + 1),
            reference_loss(base, controlnet_folder, prepared, draws, time_ids(prepared)[:, [2, 3, 0, 1, 4, 5]]),
            controlnet_loss(components, components.controlnet, _other_tokens(batch, 0), draws).mean(),
            controlnet_loss(components, components.controlnet, _other_tokens(batch, 1), draws).mean(),
        ):
            assert abs(float(wrong - expected)) > 1e-5


def test_the_pooled_caption_has_a_say(components: Components, monkeypatch: pytest.MonkeyPatch) -> None:
    draws, batch = draw(0, [0, 1, 2], LATENT_SHAPE, draw_timestep, CPU), make_batch(rows(), components, CPU)
    encode_prompts = StableDiffusionXL.encode_prompts

    def others(*arguments: Any) -> Any:
        conditioning = encode_prompts(*arguments)
        added = conditioning["added_cond_kwargs"]
        return conditioning | {"added_cond_kwargs": added | {"text_embeds": added["text_embeds"].flip(0)}}

    with torch.no_grad():
        found = controlnet_loss(components, components.controlnet, batch, draws)
        monkeypatch.setattr(StableDiffusionXL, "encode_prompts", others)
        changed = controlnet_loss(components, components.controlnet, batch, draws)
    assert ((found - changed).abs() > 1e-5).tolist() == [True, False, True]


def _other_tokens(batch: Any, place: int) -> Any:
    tokens = list(batch.tokens)
    tokens[place] = tokens[place].flip(0)
    return batch._replace(tokens=tuple(tokens))


def test_captions_are_encoded_as_the_script_does(tiny_xl_base: Path, components: Components) -> None:
    """Also the empty one, which is no row of zeros; the second tokenizer pads otherwise."""
    batch = make_batch(rows(), components, CPU)
    with torch.no_grad():
        found = components.family.encode_prompts(components, batch)
        hidden_states, pooled = encode_prompt(tiny_xl_base, CAPTIONS)
    assert torch.equal(found["encoder_hidden_states"], hidden_states)
    assert torch.equal(found["added_cond_kwargs"]["text_embeds"], pooled)
    assert hidden_states.shape == (3, 77, 40)
    assert hidden_states[1].abs().min() > 0
    assert not torch.equal(*batch.tokens)


def test_the_vae_is_in_fp32_unless_another_is_named(
    tiny_xl_base: Path, tiny_base: Path, controlnet_folder: Path
) -> None:
    own = load(tiny_xl_base, controlnet_folder, torch.bfloat16)
    assert {own.vae.dtype, own.denoiser.dtype} == {torch.float32, torch.bfloat16}
    assert {part.dtype for part in own.text_encoders} == {torch.bfloat16}
    assert own.controlnet.dtype == torch.float32
    named = load(
        tiny_xl_base, controlnet_folder, torch.bfloat16, pretrained_vae_model_name_or_path=str(tiny_base / "vae")
    )
    assert named.vae.dtype == torch.bfloat16


def test_bf16_and_gradient_checkpointing(tiny_xl_base: Path, controlnet_folder: Path, tiny_settings: Settings) -> None:
    models = {"pretrained_model_name_or_path": str(tiny_xl_base), "controlnet_model_name_or_path": controlnet_folder}
    found = []
    for changed in ({}, {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}):
        with training(tiny_settings | models | changed) as state:
            results = steps(state, fake_rows(0, 1), fake_rows(2, 3))
            found.append(torch.stack([result.loss for result in results]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=0.02, atol=0)
    assert not torch.equal(found[2], found[0])


# --- sizes ---


def test_size_conditions() -> None:
    """Top and left of the centre crop are those in the resized image, as torchvision rounds them."""
    fixed = SizeConditioning(32, (3, 5))
    assert fixed.conditions((100, 50)) == fixed.conditions(None) == (32, 32, 3, 5, 32, 32)
    real = SizeConditioning(32, real=True)
    assert real.conditions((100, 50)) == (100, 50, 16, 0, 32, 32)
    assert real.conditions((40, 60)) == (40, 60, 0, 8, 32, 32)
    assert real.conditions((32, 37)) == (32, 37, 0, 2, 32, 32)


@pytest.mark.parametrize("mode", INTERPOLATION_MODES)
def test_interpolation_is_torchvisions(mode: str) -> None:
    """In Pillow, which torchvision's transforms of the script resize pictures with; pixels at any odds are wrong."""
    pixels = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    # torchvision's Resize(32) makes 49 x 32, its CenterCrop(32) then begins at round(8.5) = 8
    filters = {name.lower(): value for name, value in Image.Resampling.__members__.items()}
    resized = picture.resize((49, 32), filters["nearest" if mode == "nearest_exact" else mode])
    expected = np.asarray(resized)[:, 8:40]
    assert np.array_equal(resize_and_crop(picture, 32, mode), expected)


# --- runs ---


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
