"""Stable Diffusion XL: the arithmetic of diffusers' script, and the sizes that the model is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from base_model import write_random_xl_base
from PIL import Image
from reference import CPU, LATENT_SHAPE, draw_timestep, fake_rows, steps, training
from reference_xl import controlnet_folder, encode_prompt, load, reference_loss
from runs import Settings

from raycontrolnet.config.settings import INTERPOLATION_MODES
from raycontrolnet.data.records import PreparedRow
from raycontrolnet.data.size_conditioning import SizeConditioning
from raycontrolnet.data.transforms import resize_and_crop
from raycontrolnet.model.batch import draw, make_batch
from raycontrolnet.model.components import Components
from raycontrolnet.model.families.stable_diffusion_xl import StableDiffusionXL
from raycontrolnet.model.step import controlnet_loss

__all__ = ["controlnet_folder"]  # a fixture

CAPTIONS = ["red circle with blue background", "", "green square"]


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
