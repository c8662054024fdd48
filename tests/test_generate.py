"""`raycontrolnet generate`: validation's images, from whatever folder holds the ControlNet; and what is refused."""

from __future__ import annotations

import errno
import io
import json
import logging
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from runs import Run, flags, metadata, states, train
from test_fidelity import measured_again, out_of_order

from raycontrolnet import GenerateConfig, PairImages, __version__, generate
from raycontrolnet.cli import main, parse
from raycontrolnet.config.output_settings import FIDELITY_MEASURES
from raycontrolnet.data.transforms import CONDITIONING_BACKGROUND, decode_rgb, resize_and_crop
from raycontrolnet.errors import ConfigError, RunError, UserError
from raycontrolnet.sampling import fidelity, find_controlnet, images, scores
from raycontrolnet.sampling import generate as generate_images
from raycontrolnet.sampling import pipeline as drawing
from raycontrolnet.sampling.fidelity import Measure
from raycontrolnet.training import validation

RESOLUTION = 32
TOKEN = "hf_not_to_be_seen"

Make = Callable[..., GenerateConfig]
Settings = dict[str, Any]
Controls = tuple[str, ...]


@pytest.fixture
def run(validated_run: Run) -> Path:
    """Return the folder of a finished run of four updates, with a checkpoint of two. Do not write into it."""
    return validated_run.folder


@pytest.fixture(scope="module")
def bf16_run(validated_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    changed = {"mixed_precision": "bf16", "max_train_steps": 1}
    return train(validated_settings | changed | {"output_dir": str(tmp_path_factory.mktemp("bf16") / "run")}).folder


@pytest.fixture
def controls(validated_settings: Settings) -> Controls:
    """Return the control images of the runs' validation."""
    return tuple(validated_settings["validation_image"])


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    """Copy the run, to write into, with a ControlNet in checkpoint-2 whose images differ."""
    from diffusers import ControlNetModel

    folder = shutil.copytree(run, tmp_path / "copy" / "run")
    controlnet = ControlNetModel.from_pretrained(folder / "checkpoint-2" / "controlnet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for weight in controlnet.parameters():
            weight.data.normal_(0, 0.5)
    controlnet.save_pretrained(folder / "checkpoint-2" / "controlnet")
    return folder


@pytest.fixture
def settings(run: Path, controls: Controls, tmp_path: Path) -> Settings:
    """Return the settings for one image with few steps."""
    return {
        "controlnet": str(run),
        "prompt": "red circle",
        "image": controls[0],
        "num_images": 1,
        "num_inference_steps": 2,
        "out": str(tmp_path / "generated"),
        "use_gpu": False,
    }


@pytest.fixture
def config(settings: Settings) -> Make:
    """config(name=value, ...): one image with few steps, unless it says otherwise."""
    return lambda **changed: GenerateConfig(**settings | changed)


def draw_and_show(config: GenerateConfig) -> tuple[list[PairImages], str]:
    """Return what `generate` returns and shows."""
    stream = io.StringIO()
    return generate(config, stream=stream), stream.getvalue()


def draw(config: GenerateConfig) -> list[PairImages]:
    return draw_and_show(config)[0]


def refusal(make: Callable[[], object]) -> str:
    """Return the message of the ConfigError that `make` raises."""
    with pytest.raises(ConfigError) as error:
        make()
    return str(error.value)


def but_the_log(out: Path) -> dict[str, tuple[bytes, int]]:
    return {name: state for name, state in states(out).items() if name != "generate.log"}


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


# --- what is drawn ---


@pytest.mark.parametrize("fixture", ["run", "bf16_run"])
def test_the_images_are_those_of_the_runs_last_validation(
    fixture: str, validated_settings: Settings, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """To the byte, with everything but seed and pairs left to the run's settings."""
    run: Path = request.getfixturevalue(fixture)
    before = states(run)
    config = GenerateConfig(
        controlnet=str(run),
        prompt=validated_settings["validation_prompt"],
        image=validated_settings["validation_image"],
        num_images=2,
        seed=validated_settings["seed"],
        control_fidelity="shape",
        out=str(tmp_path),
        use_gpu=False,
    )
    results = draw(config)
    last = max((run / "validation").iterdir())
    assert len(pictures(last)) == 8
    assert pictures(tmp_path) == pictures(last)
    assert metadata(tmp_path) == [
        {name: value for name, value in line.items() if name != "step"} for line in metadata(last)
    ]
    assert states(run) == before
    assert {path.name for path in tmp_path.iterdir()} == {*pictures(last), "metadata.jsonl", "generate.log"}
    for result, validated in zip(results, validation.latest(run), strict=True):
        assert (result.pair, result.prompt) == (validated.pair, validated.prompt)
        assert [path.name for path in result.images] == [path.name for path in validated.images]
        assert all(path.is_file() for path in (result.control, result.grid, *result.images))
    assert results == images.results(tmp_path)


def test_precision_is_the_runs_own_or_the_one_that_is_given(bf16_run: Path, config: Make, tmp_path: Path) -> None:
    drawn = {}
    for name, changed in (("own", {}), ("bf16", {"mixed_precision": "bf16"}), ("no", {"mixed_precision": "no"})):
        (result,), shown = draw_and_show(config(controlnet=str(bf16_run), out=str(tmp_path / name), **changed))
        assert ("on the CPU in bf16\n" in shown) == (name != "no")
        drawn[name] = np.asarray(opened(result.images[0])).astype(int)
    np.testing.assert_array_equal(drawn["own"], drawn["bf16"])
    assert 0 < np.abs(drawn["own"] - drawn["no"]).mean() < 8


def test_an_image_depends_on_its_place_and_the_seed(config: Make, tmp_path: Path) -> None:
    draw(config(out=str(tmp_path / "two"), num_images=2))
    draw(config(out=str(tmp_path / "one")))
    draw(config(out=str(tmp_path / "other"), seed=1))
    draw(config(out=str(tmp_path / "pairs"), prompt=["blue circle", "red circle"]))
    two, one, other, pairs = (pictures(tmp_path / name) for name in ("two", "one", "other", "pairs"))
    first = "pair-00-image-00.png"
    assert one[first] == two[first]
    assert len({two[first], two["pair-00-image-01.png"], other[first], pairs["pair-01-image-00.png"]}) == 4
    assert metadata(tmp_path / "pairs")[1] == {
        "file_name": "pair-01-image-00.png",
        "conditioning_image_file_name": "pair-01-control.png",
        "prompt": "red circle",
        "control_image": config().image[0],  # type: ignore[index]
        "pair": 1,
        "image": 0,
        "seed": int(np.random.SeedSequence((0, 1, 0)).generate_state(1)[0]),
        "scheduler": "UniPCMultistepScheduler",
        "num_inference_steps": 2,
        "guidance_scale": 7.5,
    }


def test_steps_and_guidance_matter(config: Make, tmp_path: Path) -> None:
    for name, changed in (("a", {}), ("b", {"num_inference_steps": 3}), ("c", {"guidance_scale": 0})):
        (result,) = draw(config(out=str(tmp_path / name), **changed))
        assert np.asarray(opened(result.images[0])).std() > 0
    assert len({pictures(tmp_path / name)["pair-00-image-00.png"] for name in "abc"}) == 3


def test_guidance_is_the_runs(own_run: Path, config: Make, tmp_path: Path) -> None:
    """Guidance is the run's unless a flag names another, as resolution is."""
    folder = shutil.copytree(own_run, tmp_path / "run")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | {"guidance_scale": 2.0}))
    for name, given in (("a", {}), ("b", {"guidance_scale": 2.0}), ("c", {"guidance_scale": 7.5})):
        draw(config(controlnet=str(folder), out=str(tmp_path / name), **given))
    lines = (tmp_path / "a" / "metadata.jsonl").read_text().splitlines()
    assert {json.loads(line)["guidance_scale"] for line in lines} == {2.0}
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b") != pictures(tmp_path / "c")


def control_images(folder: Path) -> list[Path]:
    """Write control images of every kind that people have."""
    grey = Image.linear_gradient("L").resize((90, 40))
    rgb = Image.merge("RGB", [grey, grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT), grey])
    depth = Image.fromarray((np.arange(50 * 70).reshape(50, 70) * 18).astype(np.uint16))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("grey.png", grey, {}),
        ("bilevel.png", grey.convert("1"), {}),
        ("palette.png", rgb.quantize(8), {}),
        ("palette_transparent.gif", rgb.quantize(8), {"transparency": 3}),
        ("grey_alpha.png", grey.convert("LA"), {}),
        ("rgba.webp", Image.new("RGBA", (33, 97), (200, 10, 10, 128)), {}),
        ("depth.png", depth, {}),
        ("depth_float.tiff", Image.fromarray(np.asarray(depth, dtype=np.float32)), {}),
        ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("rotated.jpg", rgb, {"exif": rotated}),
        ("pixel.png", Image.new("RGB", (1, 1), "red"), {}),
        ("wide.png", rgb.resize((700, 20)), {}),
    ]
    folder.mkdir()
    for name, image, options in kinds:
        image.save(folder / name, **options)
    return [folder / name for name, _, _ in kinds]


def test_any_control_image(config: Make, tmp_path: Path) -> None:
    paths = control_images(tmp_path / "controls")
    assert {opened(path).mode for path in paths} >= {"1", "L", "P", "LA", "RGBA", "I;16", "F", "CMYK", "RGB"}
    before = states(tmp_path / "controls")
    results = draw(config(image=paths, num_inference_steps=1))
    assert len(results) == len(paths) == 12
    for result, path in zip(results, paths, strict=True):
        expected = resize_and_crop(decode_rgb(str(path), background=CONDITIONING_BACKGROUND), RESOLUTION)
        np.testing.assert_array_equal(np.asarray(opened(result.control)), expected)
        assert [opened(image).size for image in result.images] == [(RESOLUTION, RESOLUTION)]
        assert opened(result.grid).size == (2 * RESOLUTION, RESOLUTION)
    assert states(tmp_path / "controls") == before


def test_a_prompt_that_is_too_long_is_said(config: Make) -> None:
    long = "blue circle " * 50
    _, shown = draw_and_show(config(prompt=["red circle", long], num_inference_steps=1))
    assert shown.splitlines()[1] == (f"a prompt has 102 tokens; those after the first 77 do nothing: {long!r}")


# --- control fidelity ---


@pytest.mark.parametrize("measure", FIDELITY_MEASURES)
def test_images_get_scores(measure: Measure, controls: Controls, config: Make) -> None:
    given = config(image=controls, num_images=2, control_fidelity=measure)
    pairs, shown = draw_and_show(given)
    found = [line["control_fidelity"] for line in metadata(Path(given.out))]
    assert found == measured_again(Path(given.out), measure)
    assert [pair.control_fidelity for pair in pairs] == [tuple(found[:2]), tuple(found[2:])]
    average = scores.average(found)
    assert average is not None
    last = shown.splitlines()[-1]
    assert last.endswith(f": 4 images, grids and metadata.jsonl in {given.out}; {scores.in_words(average)} ({measure})")
    assert " ± " in last


def test_scores_do_not_change_the_images(config: Make, tmp_path: Path) -> None:
    scored, plain = tmp_path / "scored", tmp_path / "plain"
    draw(config(num_images=2, control_fidelity="shape", out=str(scored)))
    pairs, shown = draw_and_show(config(num_images=2, out=str(plain)))
    assert pictures(scored) == pictures(plain)
    assert len(pictures(plain)) == 4
    assert [pair.control_fidelity for pair in pairs] == [None], "the run's setting is not for other images"
    assert "control_fidelity" not in (plain / "metadata.jsonl").read_text()
    assert "control fidelity" not in shown


def test_images_without_a_score(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "control_fidelity", out_of_order)
    given = config(control_fidelity="shape")
    pairs, shown = draw_and_show(given)
    log = Path(given.out) / "generate.log"
    assert shown.endswith(f"; no control fidelity, {log} says why\n")
    assert "no control fidelity (RuntimeError: OpenCV is out of order)" in log.read_text()
    assert [pair.control_fidelity for pair in pairs] == [None]


def test_a_hundred_pairs(controls: Controls, config: Make) -> None:
    """Their files sort as the pairs do."""
    prompts = [f"circle {number}" for number in range(101)]
    images = (controls * 51)[:101]
    given = config(prompt=prompts, image=images, num_inference_steps=1, batch_size=32, control_fidelity="shape")
    pairs, shown = draw_and_show(given)
    out = Path(given.out)
    assert [pair.prompt for pair in pairs] == prompts
    assert [path.name for path in sorted(out.glob("*-image-00.png"))] == [pair.images[0].name for pair in pairs]
    assert [path.name for path in sorted(out.glob("*-grid.png"))] == [pair.grid.name for pair in pairs]
    assert (pairs[7].name, pairs[100].name, pairs[100].grid.name) == ("pair-007", "pair-100", "pair-100-grid.png")
    assert shown.count(f"\n{out}/pair-") == 101
    assert "101 images" in shown.splitlines()[-1]


# --- where the ControlNet and its run's settings come from ---


def test_every_folder_that_holds_a_controlnet(
    own_run: Path, config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base model and resolution are those of the run in any case; the weights are those of the folder."""
    before = states(own_run)
    monkeypatch.chdir(own_run)
    drawn: list[dict[str, bytes]] = []
    for index, name in enumerate((
        str(own_run), ".", str(own_run / "checkpoint-2"), "./checkpoint-2", "checkpoint-2/controlnet"
    )):  # fmt: skip
        out = tmp_path / str(index)
        draw(config(controlnet=name, out=str(out)))
        assert opened(out / "pair-00-image-00.png").size == (RESOLUTION, RESOLUTION)
        drawn.append(pictures(out))
    assert drawn[0] == drawn[1]
    assert drawn[2] == drawn[3] == drawn[4]
    assert drawn[0]["pair-00-image-00.png"] != drawn[2]["pair-00-image-00.png"]
    assert states(own_run) == before


def test_a_folder_without_settings(tiny_base: Path, own_run: Path, config: Make, tmp_path: Path) -> None:
    """Folders of diffusers or the Hub: the base model must be given, and the rest has its usual defaults."""
    folder = shutil.copytree(own_run / "checkpoint-2" / "controlnet", tmp_path / "alone" / "controlnet")
    assert refusal(lambda: draw(config(controlnet=str(folder)))) == (
        "--pretrained_model_name_or_path: required, because no config.yaml of a run says which base model "
        f"{folder} was trained for"
    )
    given = {"pretrained_model_name_or_path": str(tiny_base), "num_inference_steps": 1}
    (result,) = draw(config(controlnet=str(folder), **given))
    assert opened(result.images[0]).size == (512, 512)
    (result,) = draw(config(controlnet=str(folder), resolution=64, **given))
    assert opened(result.images[0]).size == (64, 64)


def test_settings_are_those_of_the_run_unless_given(controls: Controls, own_run: Path, tmp_path: Path) -> None:
    settings = {
        "pretrained_model_name_or_path": "me/base",
        "pretrained_vae_model_name_or_path": "me/vae",
        "revision": "v2",
        "variant": "fp16",
        "tokenizer_name": "me/tokenizer",
        "cache_dir": str(tmp_path),
        "resolution": 64,
        "image_interpolation_mode": "box",
        "mixed_precision": "bf16",
        "allow_tf32": True,
    }
    file = own_run / "config.yaml"
    file.write_text(yaml.safe_dump(settings | {"learning_rate": "what", "of_a_later_version": 1}))
    found = find_controlnet.find(str(own_run))
    assert found == find_controlnet.FoundControlNet(str(own_run), settings, file)
    assert found.settings_with(None) == found.settings_with("me/base") == settings
    of_the_run = {name: settings[name] for name in list(settings)[-4:]}
    assert found.settings_with("other/base") == of_the_run

    given = GenerateConfig(controlnet="c", prompt=("a",), image=controls, resolution=8, seed=3)
    filled = given.with_defaults(settings)
    assert (filled.resolution, filled.seed, filled.mixed_precision, filled.revision) == (8, 3, "bf16", "v2")
    assert filled.pretrained_vae_model_name_or_path == "me/vae"

    settings["cache_dir"] = str(tmp_path / "of another machine")
    file.write_text(yaml.safe_dump(settings))
    assert "cache_dir" not in find_controlnet.find(str(own_run)).settings
    assert find_controlnet.find("me/controlnet") == find_controlnet.FoundControlNet("me/controlnet", {}, None)


def test_folders_that_lie_beside_other_settings(own_run: Path) -> None:
    """Only where a run puts checkpoints is the folder above a run's."""
    shutil.copytree(own_run / "checkpoint-2" / "controlnet", own_run / "mine")
    shutil.copytree(own_run / "checkpoint-2" / "controlnet", own_run / "mine" / "controlnet")
    for name, expected in (
        ("", True), ("checkpoint-2", True), ("checkpoint-2/controlnet", True), ("mine", False),
        ("mine/controlnet", False),
    ):  # fmt: skip
        assert (find_controlnet.find(str(own_run / name)).config_file is not None) == expected


# --- bad input ---


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"controlnet": ""},
            "--controlnet: required; a run's output_dir, a checkpoint-N of it, a ControlNet's folder, ",
        ),
        ({"prompt": None}, "--prompt: required; one for every control image, or one for all"),
        ({"image": None}, "--image: required; a control image for every prompt, or one for all"),
        ({"image": "gone.png"}, "--image=gone.png: no such file"),
        ({"image": "."}, "--image=.: is a folder; name a file in it"),
        ({"num_images": 0}, "--num_images=0: must be at least 1"),
        ({"num_inference_steps": 0}, "--num_inference_steps=0: must be at least 1"),
        ({"num_inference_steps": 1000}, "--num_inference_steps=1000: must be at most 999"),
        ({"guidance_scale": -1}, "--guidance_scale=-1.0: must be a number of at least 0"),
        ({"guidance_scale": "inf"}, "--guidance_scale=inf: must be a number of at least 0"),
        ({"resolution": 100}, "--resolution=100: must be divisible by 8; use 96 or 104"),
        ({"seed": -1}, "--seed=-1: must be in [0, 2**63)"),
        ({"mixed_precision": "fp8"}, "--mixed_precision=fp8: must be one of no, fp16, bf16"),
        ({"out": ""}, "--out: has no value; name a folder"),
        ({"out": "s3://bucket/images"}, "--out=s3://bucket/images: must be a local or mounted folder; URIs are not "),
        ({"out": __file__}, f"--out={__file__}: is a file; name a folder"),
        ({"num_images": "many"}, "--num_images='many': must be a whole number"),
        ({"prompt": [1]}, "--prompt=[1]: must be a text or a list of texts"),
        ({"control_fidelity": "edge"}, "--control_fidelity=edge: must be one of shape, canny"),
        ({"batch_size": 0}, "--batch_size=0: must be at least 1"),
        ({"batch_size": "many"}, "--batch_size='many': must be a whole number"),
    ],
)
def test_settings_that_cannot_be_used(changed: dict[str, Any], message: str, config: Make) -> None:
    with pytest.raises(ConfigError) as error:
        config(**changed)
    assert len(error.value.problems) == 1
    assert str(error.value).startswith(message)


def test_prompts_and_images_that_do_not_match(controls: Controls, config: Make) -> None:
    message = "--prompt, --image: 3 prompts and 2 images; give equal counts, or a single one of either"
    assert refusal(lambda: config(prompt=["a", "b", "c"], image=controls)) == message
    first, second = controls
    assert config(prompt=["a", "b"], image=controls).pairs == (("a", first), ("b", second))
    assert config(prompt=["a", "b"], image=first).pairs == (("a", first), ("b", first))
    assert config(prompt="a", image=controls).pairs == (("a", first), ("a", second))
    assert config(prompt="", image=first).pairs == (("", first),)


def test_all_problems_at_once(controls: Controls, run: Path, config: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        GenerateConfig(seed=-1, num_images=0)
    flags = [problem.partition(":")[0] for problem in error.value.problems]
    assert flags == ["--controlnet", "--prompt", "--image", "--num_images=0", "--seed=-1"]

    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    whole = Path(controls[0]).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "file").touch()
    gone = tmp_path / "gone"
    bad = config(
        controlnet=str(gone),
        image=[str(tmp_path / name) for name in ("empty.png", "text.png", "half.png")],
        pretrained_model_name_or_path=str(run),
        mixed_precision="fp16",
        out=str(tmp_path / "file" / "below"),
    )
    base = f"--pretrained_model_name_or_path={run}: no unet, vae, text_encoder, scheduler in that folder"
    lines = refusal(lambda: draw(bad)).splitlines()
    assert lines[0] == f"--image: {tmp_path / 'empty.png'} is empty"
    assert lines[1].startswith(f"--image: {tmp_path / 'text.png'} is not an image in a format that is read (PNG, ")
    assert lines[2].startswith(f"--image: {tmp_path / 'half.png'} is broken or truncated (")
    assert lines[3:] == [
        f"{base}; it must be in diffusers' layout",
        f"--controlnet={gone}: no such folder, and not the form of a Hub id (owner/name)",
        "--mixed_precision=fp16: needs a GPU; use bf16 or no on the CPU",
        f"--out={tmp_path / 'file' / 'below'}: cannot be written (Not a directory); name another folder",
    ]


def test_folders_without_a_usable_controlnet(tiny_base: Path, own_run: Path, config: Make, tmp_path: Path) -> None:
    def message(name: Path | str) -> str:
        return refusal(lambda: draw(config(controlnet=str(name))))

    unet, empty, file = tiny_base / "unet", tmp_path / "empty", own_run / "config.yaml"
    empty.mkdir()
    assert message(empty) == f"--controlnet={empty}: holds no ControlNet in diffusers' form (config.json and weights)"
    assert message(unet) == f"--controlnet={unet}: holds a UNet2DConditionModel, not a ControlNetModel"
    assert message(file) == f"--controlnet={file}: is a file; name the folder that it is in: {own_run}"
    assert message("my-controlnet") == (
        "--controlnet=my-controlnet: no such folder, and not the form of a Hub id (owner/name)\n"
        "--pretrained_model_name_or_path: required, because no config.yaml of a run says which base model "
        "my-controlnet was trained for"
    )

    (own_run / "config.json").unlink()  # as before the run's end
    checkpoint = own_run / "checkpoint-4"
    assert message(own_run) == (
        f"--controlnet={own_run}: that run has no final weights yet; name a checkpoint of it, such as {checkpoint}"
    )
    settings = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(settings | {"pretrained_model_name_or_path": "/moved/base"}))
    assert message(checkpoint) == (
        "--pretrained_model_name_or_path=/moved/base: no such folder, and not the form of a Hub id (owner/name); "
        f"{file} names it"
    )
    file.write_text(yaml.safe_dump(settings | {"resolution": "large", "mixed_precision": "fp16"}))
    assert message(checkpoint) == f"--controlnet={checkpoint}: {file}: resolution: 'large' must be a whole number"
    file.write_text(yaml.safe_dump(settings | {"mixed_precision": "fp16"}))
    assert message(checkpoint) == ("--mixed_precision=fp16 (the run's own): needs a GPU; use bf16 or no on the CPU")
    file.write_text("- a\n- b\n")
    assert message(checkpoint) == (f"--controlnet={checkpoint}: {file}: must be a list of `setting: value` lines")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(config: Make) -> None:
    message = "--use_gpu=True: there is no GPU here; leave the flag out to draw on the CPU"
    out = Path(config().out)
    assert not out.exists()
    assert refusal(lambda: draw(config(use_gpu=True, out=str(out / "below")))) == message
    assert not out.exists(), "nothing is left behind"


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")  # diffusers' own
def test_models_that_cannot_be_loaded(tiny_base: Path, own_run: Path, config: Make) -> None:
    """Found out late, but still the user's input; what an earlier time left stays."""
    from diffusers import ControlNetModel

    out = Path(config().out)
    draw(config())
    before = but_the_log(out)
    weights = own_run / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=re.escape(f"--controlnet={own_run}: cannot be loaded: ")):
        draw(config(controlnet=str(own_run)))
    made_for = ControlNetModel.load_config(own_run / "checkpoint-2" / "controlnet")
    other = ControlNetModel.from_config(made_for | {"cross_attention_dim": 8})
    other.save_pretrained(own_run)
    with pytest.raises(UserError) as error:
        draw(config(controlnet=str(own_run)))
    assert str(error.value) == (
        f"--controlnet={own_run}: made for another base model (cross_attention_dim 8, the base model's UNet has 16)"
    )
    with pytest.raises(
        UserError, match=re.escape("--controlnet=nobody/nothing: no such folder, and, as a Hub id, not")
    ):
        draw(config(controlnet="nobody/nothing", pretrained_model_name_or_path=str(tiny_base)))
    assert but_the_log(out) == before


# --- the folder for the images ---


def test_an_earlier_times_images_are_replaced(controls: Controls, config: Make) -> None:
    out = Path(config().out)
    draw(config(image=controls, num_images=2))
    before = pictures(out)
    assert len(metadata(out)) == 4
    draw(config(seed=1))
    after = pictures(out)
    assert before.keys() == after.keys()
    assert {name for name in after if after[name] != before[name]} == {"pair-00-image-00.png", "pair-00-grid.png"}
    assert [line["file_name"] for line in metadata(out)] == ["pair-00-image-00.png"]
    assert opened(out / "pair-00-grid.png").size == (2 * RESOLUTION, RESOLUTION)


@pytest.mark.parametrize(
    ("place", "held"),
    [
        ("data", "metadata.jsonl"),
        ("copy/run/validation/step-000004", "metadata.jsonl"),
        ("copy/run/images", "pair-00-control.png"),
    ],
)
def test_a_folder_whose_files_would_be_lost(
    place: str, held: str, own_run: Path, circles: Path, config: Make, tmp_path: Path
) -> None:
    shutil.copytree(circles, tmp_path / "data")
    before = states(tmp_path)
    assert refusal(lambda: draw(config(out=str(tmp_path / place)))) == (
        f"--out={tmp_path / place}: holds {held}, which was not made by `raycontrolnet generate` and would be "
        "overwritten; name another folder"
    )
    assert states(tmp_path) == before


def test_a_control_image_is_not_overwritten(config: Make) -> None:
    """Drawing from what was drawn is fine, but into another folder."""
    (result,) = draw(config())
    assert refusal(lambda: draw(config(image=str(result.images[0])))) == (
        f"--image={result.images[0]}: would be overwritten by the new images; name another --out"
    )
    draw(config(image=str(result.images[0]), out=str(result.grid.parent / "again")))


def test_a_runs_own_folder(own_run: Path, config: Make) -> None:
    """Nothing of the run's has a name that images have."""
    before = states(own_run)
    draw(config(controlnet=str(own_run), out=str(own_run)))
    after = states(own_run)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {
        "generate.log", "metadata.jsonl", "pair-00-control.png", "pair-00-grid.png", "pair-00-image-00.png"
    }  # fmt: skip


# --- failures ---


def stop_at(image: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise when the image of that index is drawn."""
    real, count = drawing.draw, iter(range(100))

    def stop(*arguments: Any, **named: Any) -> list[Image.Image]:
        if next(count) == image:
            raise error
        return real(*arguments, **named)

    monkeypatch.setattr(images, "draw", stop)


def test_a_failure_leaves_what_there_is(controls: Controls, config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path(config().out)
    draw(config(image=controls, num_images=2))
    before = but_the_log(out)
    several = config(image=controls, num_images=2, seed=1)
    stop_at(0, OSError(errno.ENOSPC, "No space left on device"), monkeypatch)
    with pytest.raises(RunError) as error:
        draw(several)
    assert str(error.value) == (
        "Drawing failed: OSError: [Errno 28] No space left on device.\n"
        f"No image was drawn. Details: {out / 'generate.log'}"
    )
    assert "Traceback" in (out / "generate.log").read_text()
    assert but_the_log(out) == before

    stop_at(3, torch.OutOfMemoryError("CUDA out of memory.\nmore"), monkeypatch)
    with pytest.raises(RunError) as error:
        draw(several)
    assert str(error.value) == (
        "Out of GPU memory: CUDA out of memory. Use a smaller --resolution, or --mixed_precision bf16.\n"
        f"3 of 4 images stand in {out}. Details: {out / 'generate.log'}"
    )
    assert [line["file_name"] for line in metadata(out)] == [
        "pair-00-image-00.png", "pair-00-image-01.png", "pair-01-image-00.png"
    ]  # fmt: skip
    assert [len(result.images) for result in images.results(out)] == [2, 1]
    assert not list(out.glob(".*"))


def test_metadata_never_tells_of_images_that_are_replaced(config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when the process dies between two images, here before anything can be made whole."""
    out = Path(config().out)
    draw(config(num_images=2))

    def die(*_: Any, **__: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(images, "finish", die)
    stop_at(1, SystemExit(), monkeypatch)
    with pytest.raises(SystemExit):
        draw(config(num_images=2, seed=1))
    assert not (out / "metadata.jsonl").exists()
    monkeypatch.undo()
    draw(config(num_images=2, seed=1))  # and the folder is known for one of ours
    assert len(metadata(out)) == 2


# --- Python and the command line ---


def test_the_process_is_left_as_it_was(config: Make) -> None:
    import diffusers.utils.logging
    import transformers.utils.logging

    def state() -> list[object]:
        loggers = [logging.getLogger(name) for name in ("raycontrolnet", "diffusers", "transformers", "py.warnings")]
        return [
            torch.random.get_rng_state().tolist(),
            random.getstate(),
            repr(np.random.get_state()),
            (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
            diffusers.utils.logging.is_progress_bar_enabled(),
            transformers.utils.logging.is_progress_bar_enabled(),
            [(logger.level, logger.handlers[:], logger.propagate) for logger in loggers],
        ]

    before = state()
    draw(config())
    assert state() == before


def test_the_token_is_written_nowhere(config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    given = config(hub_token=TOKEN)
    _, shown = draw_and_show(given)
    written = b"".join(content for content, _ in states(Path(given.out)).values()).decode(errors="replace")
    assert TOKEN not in repr(given) + shown + written + "".join(capsys.readouterr())
    assert refusal(lambda: config(hub_token=[TOKEN])) == "--hub_token: must be a text"


def test_paths_and_single_values_in_python(controls: Controls, run: Path) -> None:
    config = GenerateConfig(controlnet=run, prompt="a", image=Path(controls[0]))  # type: ignore[arg-type]
    assert (config.controlnet, config.prompt, config.image) == (str(run), ("a",), (controls[0],))
    assert config == GenerateConfig(controlnet=str(run), prompt=("a",), image=(controls[0],))


def test_flags_are_the_settings(controls: Controls, settings: Settings) -> None:
    settings |= {"prompt": ["a b", "c"], "image": controls, "seed": 5, "guidance_scale": 3.5, "resolution": 64}
    settings |= {"variant": "fp16"}
    assert parse("generate", flags(settings)) == GenerateConfig(**settings)


def test_exit_codes(settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def ask(argv: list[str]) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["generate", *argv])
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        return code, err

    code, err = ask([])
    assert code == 2
    assert [line.partition(":")[0] for line in err.splitlines()] == ["error", "--prompt", "--image"]
    assert err.startswith("error: --controlnet: required; ")
    argv = flags(settings | {"num_images": 2})
    stop_at(1, KeyboardInterrupt(), monkeypatch)
    code, err = ask(argv)
    assert code == 130
    assert err.endswith(f"Interrupted. 1 of 2 images stand in {settings['out']}.\n")
    assert len(metadata(Path(settings["out"]))) == 1
    stop_at(0, KeyboardInterrupt(), monkeypatch)
    code, err = ask(argv)
    assert code == 130
    assert err.endswith("Interrupted. No image was drawn.\n")
    stop_at(1, LookupError("something"), monkeypatch)
    code, err = ask(argv)
    assert code == 1
    assert f"error: Drawing failed: LookupError: something.\n1 of 2 images stand in {settings['out']}. Details: " in err
    monkeypatch.undo()
    monkeypatch.setattr(generate_images, "_check", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert ask(argv) == (130, "Interrupted. raycontrolnet generate was ended.\n")


def test_in_a_shell(tiny_base: Path, controls: Controls, run: Path, tmp_path: Path) -> None:
    """Show a line for the whole, one per image and the end; nothing of the libraries', and no Ray."""
    code = "import sys; from raycontrolnet.cli import main; code = main(); print('ray' in sys.modules); sys.exit(code)"
    command = [
        *(sys.executable, "-c", code, "generate", "--controlnet", str(run), "--image", *controls),
        *("--prompt", "red circle", "--num_images", "2", "--num_inference_steps", "2", "--use_gpu", "False"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    first, *lines, last = done.stderr.splitlines()
    assert first == (
        f"raycontrolnet {__version__}: {run} on {tiny_base}, 2 pairs x 2 images of 32 px, 2 steps, guidance 7.5, "
        "seed 0, on the CPU"
    )
    out = tmp_path / "generated"
    assert lines == [str(out / f"pair-0{pair}-image-0{image}.png") for pair in range(2) for image in range(2)]
    assert re.fullmatch(rf"done in 0:\d\d: 4 images, grids and metadata.jsonl in {re.escape(str(out))}", last)
    assert len(pictures(out)) == 8
    assert {path.name for path in tmp_path.iterdir()} == {"generated"}
