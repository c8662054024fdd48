"""The demo's base models and data are what diffusers and the data path expect; the demo compares, and loses nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from base_model import CONTEXT_LENGTH, SCALING_FACTOR, write_random_base
from PIL import Image
from runs import contents, metadata
from train_base import quality

from raycontrolnet import cli
from raycontrolnet.demo.demo import BASE, FOLDER, SEED, UNSEEN_SEED, num_compared, run_demo
from raycontrolnet.demo.evaluation import SHOWN, colours_are_right
from raycontrolnet.demo.shapes import COLOURS, SHAPES, draw_row, render, write_shapes
from raycontrolnet.sampling.fidelity import asked_shape, found_shape, iou


def test_base_depends_on_the_seed_alone_and_leaves_torchs_randomness(tiny_base: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = contents(write_random_base(tmp_path / "again", "tiny"))
    other = contents(write_random_base(tmp_path / "other", "tiny", seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert again == contents(tiny_base)
    assert len(again) >= 10
    weights = {name for name in again if name.endswith(".safetensors")}
    assert {name for name in again if again[name] != other[name]} == weights
    assert sum(map(len, again.values())) < 2e6


@pytest.mark.parametrize("fixture", ["tiny_base", "tiny_base_v"])
def test_base_drives_a_controlnet_pipeline(fixture: str, request: pytest.FixtureRequest) -> None:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel

    base = request.getfixturevalue(fixture)
    controlnet = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(base, subfolder="unet"))
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(base, controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("red circle", image=Image.new("RGB", (32, 32)), num_inference_steps=2).images
    assert image.size == (32, 32)
    assert pipeline.vae_scale_factor == 8
    config = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == ("epsilon" if fixture == "tiny_base" else "v_prediction")
    assert (config["beta_start"], config["beta_end"], config["beta_schedule"]) == (0.00085, 0.012, "scaled_linear")
    assert (config["num_train_timesteps"], config["steps_offset"], config["clip_sample"]) == (1000, 1, False)


def test_latents_are_of_order_one(tiny_base: Path, circles: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_base, subfolder="vae")
    assert vae.config.scaling_factor == SCALING_FACTOR
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted((circles / "images").iterdir())])
    posterior = vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    assert posterior.mean.shape == (13, 4, 4, 4)
    assert 0.5 < (posterior.sample() * SCALING_FACTOR).std() < 2
    assert posterior.logvar.abs().max() < 6


def test_tokenizer_is_clips(tiny_base: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tiny_base, subfolder="tokenizer")
    texts = ["red circle with blue background", "", "Größe 12 ≥ 3, 円 " * 40]
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (3, CONTEXT_LENGTH)
    assert tokenizer.model_max_length == CONTEXT_LENGTH
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end
    assert (ids[:, 0] == start).all()
    assert (ids[0] == end).sum() == CONTEXT_LENGTH - 6, "each word of a caption is one token"
    assert (ids[1, 1:] == end).all()
    assert (ids[2] == end).sum() == 1
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == texts[0]
    text_encoder = CLIPTextModel.from_pretrained(tiny_base, subfolder="text_encoder")
    assert text_encoder.config.vocab_size == len(tokenizer) == end + 1
    assert text_encoder.config.eos_token_id == end


def test_circles_are_what_their_captions_say(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "circles", 20, resolution=64, seed=3)
    rows = metadata(folder)
    assert len(rows) == 20
    for row in rows:
        assert list(row) == ["image", "conditioning_image", "text"]
        image, outline = (Image.open(folder / row[column]) for column in ("image", "conditioning_image"))
        assert image.mode == outline.mode == "RGB"
        assert image.size == outline.size == (64, 64)
        circle, _, _, background, _ = row["text"].split()
        assert circle != background
        white = np.argwhere(np.asarray(outline)[..., 0] > 127)
        assert len(white) > 10
        y, x = white.mean(axis=0).round().astype(int)
        pixels = np.asarray(image)
        assert tuple(pixels[y, x]) == COLOURS[circle]
        colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
        assert {tuple(colour) for colour in colours[counts.argsort()[-2:]]} == {COLOURS[circle], COLOURS[background]}


def test_more_circles_begin_with_the_fewer(circles: Path, tmp_path: Path) -> None:
    fewer, more = contents(circles), contents(write_shapes(tmp_path, 15, resolution=32))
    assert len(fewer) == 2 * 13 + 1
    assert more["metadata.jsonl"].startswith(fewer.pop("metadata.jsonl"))
    assert {name: more[name] for name in fewer} == fewer
    del more["metadata.jsonl"]
    assert more.keys() - fewer.keys() == {f"{kind}/{i:05}.png" for kind in ("images", "conditioning") for i in (13, 14)}


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_enclose_the_shapes(shape: str) -> None:
    for index in range(20):
        row = draw_row(index, 64, 5, [shape])
        assert row.text.split()[1] == shape
        assert iou(asked_shape(np.asarray(row.conditioning_image)), found_shape(np.asarray(row.image))) > 0.9


def test_right_colours_are_told_from_wrong_ones() -> None:
    square = [(20.0, 20.0), (40.0, 20.0), (40.0, 40.0), (20.0, 40.0)]
    for shape, background in (("red", "blue"), ("navy", "black"), ("brown", "olive"), ("white", "yellow")):
        image = np.asarray(render(square, 64, COLOURS[shape], COLOURS[background]))
        noisy = np.clip(image + np.random.default_rng(0).normal(0, 8, image.shape), 0, 255).astype(np.uint8)
        for picture in (image, noisy):
            assert colours_are_right(picture, f"{shape} square with {background} background")
            assert not colours_are_right(picture, f"{background} square with {shape} background")
            assert not colours_are_right(picture, f"{shape} square with gray background")
    assert not colours_are_right(np.full((64, 64, 3), 30, np.uint8), "black square with black background")


def test_the_base_in_the_package_is_small_and_half_precision() -> None:
    from safetensors import safe_open

    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) < 15e6
    files = list(BASE.rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"text_encoder", "unet", "vae"}
    for file in files:
        with safe_open(file, "pt") as weights:
            names = [name for name in weights.keys() if "position_ids" not in name]  # noqa: SIM118 (no mapping)
            assert {weights.get_tensor(name).dtype for name in names} == {torch.float16}
    assert all("/" not in json.dumps(json.loads(file.read_text()).get("_name_or_path", ""))
               for file in BASE.rglob("config.json"))  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' UniPC and numpy 2
def test_the_base_in_the_package_is_the_one_that_was_measured() -> None:
    """And it is as good as its record says; at chance, one in 240 would have both colours right."""
    record = json.loads((BASE / "quality.json").read_text())
    assert record["images"] >= 200
    assert record["reconstruction_psnr_db"] >= 30
    assert record["right_colours_by_guidance_scale"]["3"] >= 0.95
    measured = quality(BASE, num_images=16, guidance_scales=(3.0,))
    assert measured["sha256"] == record["sha256"]
    assert len(record["sha256"]) == 3
    assert measured["reconstruction_psnr_db"] >= 30
    assert measured["right_colours_by_guidance_scale"]["3"] >= 0.9


def test_the_unseen_rows_are_nobodys_training_rows() -> None:
    """Neither the ControlNet's nor, by the seed that its script uses, the base model's."""
    record = json.loads((BASE / "quality.json").read_text())
    assert len({SEED, UNSEEN_SEED, record["seed"] + 1}) == 3
    assert draw_row(0, 8, SEED).text != draw_row(0, 8, UNSEEN_SEED).text


@pytest.fixture
def demo_flags(tiny_base: Path, circles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the flags of a demo of two updates in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return [
        *("--pretrained_model_name_or_path", str(tiny_base), "--train_data_dir", str(circles), "--resolution", "32"),
        *("--num_workers", "0", "--max_train_steps", "2", "--checkpointing_steps", "1", "--report_to", "none"),
    ]


def test_a_second_demo_takes_a_new_folder(demo_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", *demo_flags]) == 0
    first = capsys.readouterr()
    assert "The ControlNet is in raycontrolnet-demo/controlnet," in first.out
    assert "raycontrolnet train --pretrained_model_name_or_path" in first.out
    assert "control fidelity" not in first.out, "it is measured on the demo's own base model"
    assert "writing" not in first.err, "the demo's base and data were not asked for"
    kept = {path: path.stat().st_mtime_ns for path in (FOLDER / "controlnet").rglob("*")}
    assert len(kept) > 8

    assert cli.main(["demo", *demo_flags]) == 0
    second = capsys.readouterr()
    assert (
        "raycontrolnet-demo/controlnet holds an earlier demo (up to update 2); this one goes to "
        "raycontrolnet-demo/controlnet-2" in second.err
    )
    assert "The ControlNet is in raycontrolnet-demo/controlnet-2," in second.out
    assert {path: path.stat().st_mtime_ns for path in (FOLDER / "controlnet").rglob("*")} == kept

    assert cli.main(["demo", *demo_flags, "--resume_from_checkpoint", "checkpoint-1"]) == 0
    assert "updates 1 to 2" in capsys.readouterr().err
    assert not (FOLDER / "controlnet-3").exists()

    named = ["--output_dir", str(FOLDER / "controlnet-2")]
    assert cli.main(["demo", *demo_flags, *named]) == 2
    assert "holds checkpoint-2 of an earlier run" in capsys.readouterr().err


def test_demo_writes_what_it_needs_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("raycontrolnet.demo.demo.NUM_UNSEEN", 4)
    monkeypatch.setattr("raycontrolnet.demo.demo.NUM_ROWS", 40)
    flags = ["--num_workers", "0", "--max_train_steps", "2", "--validation_steps", "2", "--report_to", "none"]
    result = run_demo(cli.parse("demo", flags))
    output = capsys.readouterr()
    found = re.findall(
        r"^  (before|after) +control fidelity (\S+) ± \S+ \(2 standard errors\), colours right in (\d+)%$",
        output.out,
        re.M,
    )
    assert [name for name, _, _ in found] == ["before", "after"]
    assert all(0 < float(fidelity) < 0.9 for _, fidelity, _ in found)
    assert all(int(right) >= 75 for _, _, right in found), "the base model draws the colours of the prompt"
    (picture,) = re.findall(r"^  picture  (\S+)$", output.out, re.M)
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > 1000
    assert len((FOLDER / "shapes" / "metadata.jsonl").read_text().splitlines()) == 40
    assert "in a folder like raycontrolnet-demo/shapes" in output.out
    assert result.control_fidelity is not None
    figures = json.loads((FOLDER / "controlnet" / "demo.json").read_text())
    assert [f"{figures[name]['control_fidelity']:.2f}" for name, _, _ in found] == [shown for _, shown, _ in found]


def test_a_short_demo_draws_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In proportion to its updates; the whole demo draws as before."""

    def compared(*flags: str) -> int:
        return num_compared(cli.parse("demo", flags))

    assert compared() == compared("--max_train_steps", "1000") == compared("--max_train_steps", "5000") == 100
    assert compared("--max_train_steps", "400") == 40
    assert compared("--max_train_steps", "2") == SHOWN

    class Ends(Exception):
        pass

    asked = []

    def evaluate(*_: Any, number: int, **__: Any) -> None:
        asked.append(number)
        raise Ends

    result = SimpleNamespace(output_dir=Path("raycontrolnet-demo/controlnet"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("raycontrolnet.demo.demo.NUM_ROWS", 4)
    monkeypatch.setattr("raycontrolnet.launch.fit.fit", lambda _: result)
    monkeypatch.setattr("raycontrolnet.demo.evaluation.evaluate", evaluate)
    for steps in (20, 1000):
        with pytest.raises(Ends):
            run_demo(cli.parse("demo", ["--max_train_steps", str(steps)]))
    assert asked == [SHOWN, 100]
    said = capsys.readouterr().err
    assert said.count("a short demo, of 20 updates in place of 1,000: before and after are compared on 8 unseen ") == 1
    assert said.count("a short demo") == 1


def test_demo_says_that_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    FOLDER.write_text("a file is in the way")
    assert cli.main(["demo"]) == 2
    message = capsys.readouterr().err
    assert f"error: {tmp_path / FOLDER}: cannot be written (File exists); run the demo in another folder" in message
