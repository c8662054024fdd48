"""Validation images: what is planned, drawn and written, and what must not change while they are drawn."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from runs import metadata

from raycontrolnet.config.output_settings import ValidationConfig
from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import DataError
from raycontrolnet.model.components import Components, load_components
from raycontrolnet.quiet import only_errors
from raycontrolnet.sampling import images, pipeline
from raycontrolnet.sampling.images import ImageItem
from raycontrolnet.sampling.pipeline import DrawOptions
from raycontrolnet.training import validation
from raycontrolnet.training.validation import FLAG, StepImages

RESOLUTION = 32
CPU = torch.device("cpu")
FEW = DrawOptions(RESOLUTION, num_inference_steps=4)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """At this size threads only wait for each other: on a busy machine twenty times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def components_of(base: Path, dtype: torch.dtype = torch.float32) -> Components:
    components = load_components(ModelConfig(pretrained_model_name_or_path=str(base)), device=CPU, dtype=dtype, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = components.denoiser.float()
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
        components.denoiser.to(dtype)
        for weight in controlnet.parameters():
            if not weight.detach().any():  # zero convolutions would hide the control image
                weight.data.normal_(0, 0.5)
        for name, weight in controlnet.controlnet_cond_embedding.named_parameters():
            if name.endswith("weight"):  # as would many layers of small ones, and an untrained UNet
                torch.nn.init.kaiming_normal_(weight)
        controlnet.controlnet_cond_embedding.conv_out.weight.data.mul_(100)
    return dataclasses.replace(components, controlnet=controlnet.train())


@pytest.fixture(scope="module")
def components(tiny_base: Path) -> Components:
    return components_of(tiny_base)


@pytest.fixture
def config(tmp_path: Path) -> ValidationConfig:
    """Two pairs with equal prompts and control images of other sizes and modes, three images each."""
    Image.linear_gradient("L").resize((40, 90)).save(tmp_path / "grey.png")
    rgba = Image.new("RGBA", (70, 50), (0, 0, 0, 0))
    rgba.paste((255, 0, 0, 255), (20, 10, 50, 40))
    rgba.save(tmp_path / "transparent.png")
    return ValidationConfig(
        validation_prompt=("red circle",),
        validation_image=(str(tmp_path / "grey.png"), str(tmp_path / "transparent.png")),
        num_validation_images=3,
    )


def plan(config: ValidationConfig, seed: int = 7) -> list[ImageItem]:
    return images.plan(config.validation_pairs, config.num_validation_images, seed, FLAG)


def pixels(image: Image.Image | Path) -> np.ndarray[Any, Any]:
    return np.asarray(image if isinstance(image, Image.Image) else Image.open(image))


def drawn(components: Components, items: list[ImageItem], options: DrawOptions = FEW) -> list[Any]:
    """Pixels of `items`, as integers that can be subtracted."""
    found = list(images.draw_items(components, items, options))
    assert [item for item, _ in found] == items
    return [pixels(image).astype(int) for _, image in found]


def test_plan(config: ValidationConfig) -> None:
    items = plan(config)
    assert [(item.pair, item.image) for item in items] == [(p, i) for p in range(2) for i in range(3)]
    assert {item.prompt for item in items} == {"red circle"}
    assert [item.control_image for item in items[::3]] == list(config.validation_image or ())
    assert len({item.seed for item in items}) == 6
    assert items == plan(config)
    assert {item.seed for item in items}.isdisjoint(item.seed for item in plan(config, seed=8))
    assert plan(ValidationConfig()) == []
    Path(items[0].control_image).unlink()  # which is not needed any more
    assert items[0].control(DrawOptions(RESOLUTION)).size == (RESOLUTION, RESOLUTION)


def test_check_names_every_bad_image(config: ValidationConfig, tmp_path: Path) -> None:
    images.check(config.validation_pairs, FLAG)
    images.check((), FLAG)
    (tmp_path / "empty.png").touch()
    whole = (tmp_path / "grey.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    names = ("grey.png", "empty.png", "half.png", "missing.png")
    pairs = [("a", str(tmp_path / name)) for name in names]
    with pytest.raises(DataError) as error:
        images.check(pairs, FLAG)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, names[1:], strict=True):
        assert line.startswith("--validation_image: ")
        assert str(tmp_path / name) in line
    with pytest.raises(DataError, match=r"--validation_image: .*missing.png: cannot be read \(No such file or direct"):
        images.plan(pairs, 1, 0, FLAG)


@pytest.mark.parametrize("base", ["tiny_base", "tiny_base_v"])
def test_images_are_those_of_the_pipeline(base: str, config: ValidationConfig, request: pytest.FixtureRequest) -> None:
    """Equal to the reference's way: the pipeline loaded from the folder, UniPC, 20 steps, guidance 7.5."""
    from diffusers import StableDiffusionControlNetPipeline, UniPCMultistepScheduler

    folder = request.getfixturevalue(base)
    components = components_of(folder)
    item = plan(config)[4]
    ((drawn_item, image),) = images.draw_items(components, [item], DrawOptions(RESOLUTION))
    assert drawn_item is item
    with only_errors():
        reference = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=components.controlnet)
        reference.scheduler = UniPCMultistepScheduler.from_config(reference.scheduler.config)
        reference.set_progress_bar_config(disable=True)
        (expected,) = reference(
            "red circle",
            image=item.control(DrawOptions(RESOLUTION)),
            num_inference_steps=20,
            guidance_scale=7.5,
            generator=torch.Generator().manual_seed(item.seed),
        ).images
    np.testing.assert_array_equal(pixels(image), pixels(expected))
    assert pixels(image).std() > 1  # not a plain picture, for which anything would be equal


def test_control_image_and_seed_matter(components: Components, config: ValidationConfig) -> None:
    items = plan(config)
    other_control = replace(items[3], seed=items[0].seed)
    first, *others, again = drawn(components, [items[0], items[1], other_control, items[0]])
    for other in others:
        assert np.abs(first - other).mean() > 0.5
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_batches_draw_the_same_but_for_rounding(
    components: Components, config: ValidationConfig, batch_size: int
) -> None:
    """Each with its own prompt, control image and seed, also where a batch holds images of several pairs."""
    items = [replace(item, prompt=f"{item.prompt} {item.image}") for item in plan(config)]
    singly, together = drawn(components, items), drawn(components, items, replace(FEW, batch_size=batch_size))
    for one, other in zip(singly, together, strict=True):
        assert np.abs(one - other).max() <= 2
    assert min(np.abs(one - other).mean() for one, other in combinations(singly, 2)) > 0.5


def test_the_files_of_many_pairs_sort(config: ValidationConfig) -> None:
    path = (config.validation_image or ())[0]
    for count, first, last in ((100, "00", "99"), (101, "000", "100"), (1001, "0000", "1000")):
        items = images.plan([("a", path)] * count, 1, 0, "--image")
        for kind in ("file_name", "control_file_name", "grid_file_name"):
            names = [getattr(item, kind) for item in items]
            assert names == sorted(names)
            assert names[0].startswith(f"pair-{first}-")
            assert names[-1].startswith(f"pair-{last}-")


def test_models_and_random_state_stay_as_they_were(
    components: Components, config: ValidationConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    """And nothing is printed."""
    modules = (components.text_encoders[0], components.vae, components.denoiser, components.controlnet)
    components.denoiser.train()
    components.denoiser.mid_block.eval()  # also where the modes of the parts differ

    def state() -> list[object]:
        parts = [part for module in modules for part in module.modules()]
        weights = [weight for module in modules for weight in module.parameters()]
        return [
            [part.training for part in parts],
            [(weight.requires_grad, weight.dtype, weight._version) for weight in weights],
            torch.random.get_rng_state().tolist(),
            random.getstate(),
            repr(np.random.get_state()),
            torch.is_grad_enabled(),
            [logging.getLogger(name).level for name in ("diffusers", "transformers")],
        ]

    before, during = state(), []
    for _ in images.draw_items(components, plan(config)[:2], FEW):
        during.append(state())  # also between two images
    assert during == [before, before]
    assert capfd.readouterr() == ("", "")
    components.denoiser.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype, tiny_base: Path, components: Components, config: ValidationConfig) -> None:
    """Half-precision frozen models and an fp32 ControlNet work together under autocast, and draw about the same."""
    (exact,) = drawn(components, plan(config)[:1])
    (rounded,) = drawn(components_of(tiny_base, dtype), plan(config)[:1], replace(FEW, precision=dtype))
    assert np.abs(exact - rounded).mean() < 8
    assert not torch.is_autocast_enabled("cpu")


def test_folder(components: Components, config: ValidationConfig, tmp_path: Path) -> None:
    items = plan(config)
    one, two = (StepImages(tmp_path / name, 12, items, FEW) for name in ("one", "two"))
    for rank in (0, 1):
        two.draw(components, rank, world_size=2)
        written = sorted(path.name for path in (tmp_path / "two/validation/step-000012").iterdir())
        assert written == sorted(item.file_name for item in (items[::2] if rank == 0 else items))
    one.draw(components)
    results = two.finish()

    folder = tmp_path / "two/validation/step-000012"
    others = {f"pair-{pair:02d}-{kind}.png" for pair in range(2) for kind in ("control", "grid")}
    assert {path.name for path in folder.iterdir()} == {item.file_name for item in items} | others | {"metadata.jsonl"}
    for item in items:  # the same whoever drew it
        np.testing.assert_array_equal(
            pixels(folder / item.file_name), pixels(tmp_path / "one/validation/step-000012" / item.file_name)
        )
    lines = metadata(folder)
    assert [line["file_name"] for line in lines] == [item.file_name for item in items]
    assert lines[4] == {
        "file_name": "pair-01-image-01.png",
        "conditioning_image_file_name": "pair-01-control.png",
        "prompt": "red circle",
        "control_image": str(tmp_path / "transparent.png"),
        "pair": 1,
        "image": 1,
        "step": 12,
        "seed": items[4].seed,
        "scheduler": "UniPCMultistepScheduler",
        "num_inference_steps": 4,
        "guidance_scale": 7.5,
    }
    assert [(result.name, result.step) for result in results] == [("pair-00", 12), ("pair-01", 12)]
    assert results == validation.latest(tmp_path / "two")
    for result, item in zip(results, items[::3], strict=True):
        np.testing.assert_array_equal(pixels(result.control), pixels(item.control(DrawOptions(RESOLUTION))))
        tiles = [pixels(result.control), *map(pixels, result.images)]
        np.testing.assert_array_equal(pixels(result.grid), np.concatenate(tiles, axis=1))
    # the picture is used upright, on black, its middle
    assert pixels(results[1].control)[0, 0].tolist() == [0, 0, 0]
    assert pixels(results[1].control)[16, 16].tolist() == [255, 0, 0]


def test_a_failure_is_logged_and_leaves_what_there_is(
    components: Components,
    config: ValidationConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    items = plan(config)
    step_5 = StepImages(tmp_path, 5, items, FEW)
    step_5.draw(components)  # an earlier run, which then went back
    step_5.finish()
    real: Callable[..., list[Image.Image]] = pipeline.draw

    def out_of_memory(*arguments: Any, **named: Any) -> list[Image.Image]:
        if arguments[4] == [items[1].seed]:
            raise torch.OutOfMemoryError("no memory left")
        return real(*arguments, **named)

    monkeypatch.setattr(images, "draw", out_of_memory)
    step_5.draw(components)
    assert validation.latest(tmp_path) == []  # metadata.jsonl of before is gone
    assert replace(step_5, step=6).finish() == []
    assert not validation.step_folder(tmp_path, 6).exists()
    (result,) = step_5.finish()
    assert [path.name for path in result.images] == ["pair-00-image-00.png"]
    assert "step 5: no validation images (OutOfMemoryError: no memory left); training goes on" in caplog.text

    caplog.clear()
    (tmp_path / "file").touch()
    no_folder = replace(step_5, output_dir=tmp_path / "file")
    no_folder.draw(components)
    assert no_folder.finish() == []
    assert caplog.text.count("training goes on") == 1


def test_long_prompts_are_said_once(
    components: Components, config: ValidationConfig, caplog: pytest.LogCaptureFixture
) -> None:
    drawn(components, [replace(item, prompt="red circle " * 50) for item in plan(config)[:2]])
    assert [record.name for record in caplog.records] == ["raycontrolnet.model.prompts"]
    assert "102 tokens; those after the first 77 do nothing" in caplog.text


def test_latest_is_by_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        folder = validation.step_folder(tmp_path, step)
        folder.mkdir(parents=True)
        line = {"step": step, "pair": 0, "prompt": "", "file_name": "a.png", "conditioning_image_file_name": "c.png"}
        (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    validation.step_folder(tmp_path, 2_000_000).mkdir()  # not finished
    assert [result.step for result in validation.latest(tmp_path)] == [1_000_000]
    assert validation.latest(tmp_path / "nothing") == []
