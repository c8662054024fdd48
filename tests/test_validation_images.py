"""Validation images: what is planned, drawn and written, and what must not change while they are drawn."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from raycontrolnet.config.output_settings import ValidationConfig
from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.errors import DataError
from raycontrolnet.model.components import Components, load_components, with_controlnet
from raycontrolnet.sampling import images
from raycontrolnet.sampling import pipeline as drawing
from raycontrolnet.sampling.pipeline import Sampling
from raycontrolnet.training import validation

RESOLUTION = 32
CPU = torch.device("cpu")
FEW = Sampling(num_inference_steps=4)


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
        unet = components.unet.float()
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
        components.unet.to(dtype)
        for weight in controlnet.parameters():
            if not weight.detach().any():  # zero convolutions would hide the control image
                weight.data.normal_(0, 0.5)
        for name, weight in controlnet.controlnet_cond_embedding.named_parameters():
            if name.endswith("weight"):  # as would many layers of small ones, and an untrained UNet
                torch.nn.init.kaiming_normal_(weight)
        controlnet.controlnet_cond_embedding.conv_out.weight.data.mul_(100)
    return with_controlnet(components, controlnet.train())


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


def pixels(image: Image.Image | Path) -> np.ndarray[Any, Any]:
    return np.asarray(image if isinstance(image, Image.Image) else Image.open(image))


def test_plan(config: ValidationConfig) -> None:
    items = validation.plan(config, seed=7)
    assert [(item.pair, item.image) for item in items] == [(p, i) for p in range(2) for i in range(3)]
    assert {item.prompt for item in items} == {"red circle"}
    assert [item.control_image for item in items[::3]] == list(config.validation_image or ())
    assert len({item.seed for item in items}) == 6
    assert items == validation.plan(config, seed=7)
    assert {item.seed for item in items}.isdisjoint(item.seed for item in validation.plan(config, seed=8))
    assert validation.plan(ValidationConfig(), seed=7) == []


def test_items_do_not_need_the_files_any_more(config: ValidationConfig) -> None:
    (item, *_) = validation.plan(config, seed=7)
    Path(item.control_image).unlink()
    assert item.control(RESOLUTION).size == (RESOLUTION, RESOLUTION)


def test_check_names_every_bad_image(config: ValidationConfig, tmp_path: Path) -> None:
    validation.check(config)
    validation.check(ValidationConfig())
    (tmp_path / "empty.png").touch()
    whole = (tmp_path / "grey.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    names = ("grey.png", "empty.png", "half.png", "missing.png")
    bad = ValidationConfig(validation_prompt=("a",), validation_image=tuple(str(tmp_path / name) for name in names))
    with pytest.raises(DataError) as error:
        validation.check(bad)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, names[1:], strict=True):
        assert line.startswith("--validation_image: ")
        assert str(tmp_path / name) in line
    with pytest.raises(DataError, match=r"missing.png: cannot be read \(No such file or directory\)"):
        validation.plan(bad, seed=0)


@pytest.mark.parametrize("base", ["tiny_base", "tiny_base_v"])
def test_images_are_those_of_the_pipeline(base: str, config: ValidationConfig, request: pytest.FixtureRequest) -> None:
    """Equal to the reference's way: the pipeline loaded from the folder, UniPC, 20 steps, guidance 7.5."""
    from diffusers import StableDiffusionControlNetPipeline, UniPCMultistepScheduler

    folder = request.getfixturevalue(base)
    components = components_of(folder)
    item = validation.plan(config, seed=7)[4]
    ((drawn, image),) = images.draw_items(components, [item], resolution=RESOLUTION, device=CPU)
    assert drawn is item
    with drawing._quiet():
        pipeline = StableDiffusionControlNetPipeline.from_pretrained(folder, controlnet=components.controlnet)
        pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        (expected,) = pipeline(
            "red circle",
            image=item.control(RESOLUTION),
            num_inference_steps=20,
            guidance_scale=7.5,
            generator=torch.Generator().manual_seed(item.seed),
        ).images
    np.testing.assert_array_equal(pixels(image), pixels(expected))
    assert pixels(image).std() > 1  # not a plain picture, for which anything would be equal


def test_control_image_and_seed_matter(components: Components, config: ValidationConfig) -> None:
    items = validation.plan(config, seed=7)
    first, other_control = items[0], dataclasses.replace(items[3], seed=items[0].seed)
    drawn = [
        pixels(image)
        for _, image in images.draw_items(
            components,
            [first, items[1], other_control, first],
            resolution=RESOLUTION,
            device=CPU,
            sampling=FEW,
        )
    ]
    for other in (1, 2):
        assert np.abs(drawn[0].astype(int) - drawn[other]).mean() > 0.5
    np.testing.assert_array_equal(drawn[0], drawn[3])


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_batches_draw_the_same_but_for_rounding(
    components: Components, config: ValidationConfig, batch_size: int
) -> None:
    """Each with its own prompt, control image and seed, also where a batch holds images of several pairs."""
    items = [
        dataclasses.replace(item, prompt=f"{item.prompt} {item.image}") for item in validation.plan(config, seed=7)
    ]
    drawn: dict[int, list[Any]] = {}
    for size in (1, batch_size):
        options: dict[str, Any] = {"resolution": RESOLUTION, "device": CPU, "sampling": FEW, "batch_size": size}
        found = list(images.draw_items(components, items, **options))
        assert [item for item, _ in found] == items
        drawn[size] = [pixels(image).astype(int) for _, image in found]
    for one, other in zip(drawn[1], drawn[batch_size], strict=True):
        assert np.abs(one - other).max() <= 2
    assert min(np.abs(one - other).mean() for one, other in combinations(drawn[1], 2)) > 0.5


def test_the_files_of_many_pairs_sort(config: ValidationConfig) -> None:
    path = (config.validation_image or ())[0]
    for count, first, last in (
        (100, "pair-00", "pair-99"),
        (101, "pair-000", "pair-100"),
        (1001, "pair-0000", "pair-1000"),
    ):
        items = images.plan([("a", path)] * count, 1, 0, "--image")
        for names in (
            [i.file_name for i in items],
            [i.control_file_name for i in items],
            [i.grid_file_name for i in items],
        ):
            assert names == sorted(names)
            assert (names[0][: len(first)], names[-1][: len(last)]) == (first, last)


def test_models_and_random_state_stay_as_they_were(components: Components, config: ValidationConfig) -> None:
    modules = (components.text_encoder, components.vae, components.unet, components.controlnet)
    components.unet.train()
    components.unet.mid_block.eval()  # also where the modes of the parts differ

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

    items = validation.plan(config, seed=7)[:2]
    before, during = state(), []
    drawn = images.draw_items(components, items, resolution=RESOLUTION, device=CPU, sampling=FEW)
    for _ in drawn:
        during.append(state())  # also between two images
    assert during == [before, before]
    components.unet.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype, tiny_base: Path, components: Components, config: ValidationConfig) -> None:
    """Half-precision frozen models and an fp32 ControlNet work together under autocast, and draw about the same."""
    items = validation.plan(config, seed=7)[:1]
    options: dict[str, Any] = {"resolution": RESOLUTION, "device": CPU, "sampling": FEW}
    ((_, exact),) = images.draw_items(components, items, **options)
    ((_, rounded),) = images.draw_items(components_of(tiny_base, dtype), items, autocast=dtype, **options)
    assert np.abs(pixels(exact).astype(int) - pixels(rounded)).mean() < 8
    assert not torch.is_autocast_enabled("cpu")


def test_folder(components: Components, config: ValidationConfig, tmp_path: Path) -> None:
    items = validation.plan(config, seed=7)
    options: dict[str, Any] = {"resolution": RESOLUTION, "sampling": FEW}
    for rank in (0, 1):
        validation.write(tmp_path / "two", 12, items, components, device=CPU, shard=(rank, 2), **options)
        written = sorted(path.name for path in (tmp_path / "two/validation/step-000012").iterdir())
        assert written == sorted(item.file_name for item in (items[::2] if rank == 0 else items))
    validation.write(tmp_path / "one", 12, items, components, device=CPU, **options)
    results = validation.finish(tmp_path / "two", 12, items, **options)

    folder = tmp_path / "two/validation/step-000012"
    others = {f"pair-{pair:02d}-{kind}.png" for pair in range(2) for kind in ("control", "grid")}
    assert {path.name for path in folder.iterdir()} == {item.file_name for item in items} | others | {"metadata.jsonl"}
    for item in items:  # the same whoever drew it
        np.testing.assert_array_equal(
            pixels(folder / item.file_name), pixels(tmp_path / "one/validation/step-000012" / item.file_name)
        )
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
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
    assert [result.key for result in results] == ["validation/pair-00", "validation/pair-01"]
    assert results == validation.latest(tmp_path / "two")
    for result, item in zip(results, items[::3], strict=True):
        np.testing.assert_array_equal(pixels(result.control), pixels(item.control(RESOLUTION)))
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
    items = validation.plan(config, seed=7)
    options: dict[str, Any] = {"resolution": RESOLUTION, "sampling": FEW}
    validation.write(tmp_path, 5, items, components, device=CPU, **options)  # an earlier run, which then went back
    validation.finish(tmp_path, 5, items, resolution=RESOLUTION)
    real: Callable[..., list[Image.Image]] = drawing.draw

    def out_of_memory(*arguments: Any, **named: Any) -> list[Image.Image]:
        if arguments[3] == [items[1].seed]:
            raise torch.OutOfMemoryError("no memory left")
        return real(*arguments, **named)

    monkeypatch.setattr(images, "draw", out_of_memory)
    validation.write(tmp_path, 5, items, components, device=CPU, **options)
    assert validation.latest(tmp_path) == []  # metadata.jsonl of before is gone
    assert validation.finish(tmp_path, 6, items, resolution=RESOLUTION) == []
    assert not validation.step_folder(tmp_path, 6).exists()
    (result,) = validation.finish(tmp_path, 5, items, resolution=RESOLUTION)
    assert [path.name for path in result.images] == ["pair-00-image-00.png"]
    assert "step 5: no validation images (OutOfMemoryError: no memory left); training goes on" in caplog.text

    caplog.clear()
    (tmp_path / "file").touch()
    validation.write(tmp_path / "file", 5, items, components, device=CPU, **options)
    assert validation.finish(tmp_path / "file", 5, items, resolution=RESOLUTION) == []
    assert caplog.text.count("training goes on") == 1


def test_long_prompts_are_said_once(
    components: Components, config: ValidationConfig, caplog: pytest.LogCaptureFixture
) -> None:
    items = [dataclasses.replace(item, prompt="red circle " * 50) for item in validation.plan(config, seed=7)[:2]]
    assert len(list(images.draw_items(components, items, resolution=32, device=CPU, sampling=FEW))) == 2
    assert [record.name for record in caplog.records] == ["raycontrolnet.model.prompts"]
    assert "102 tokens; those after the first 77 do nothing" in caplog.text


def test_nothing_is_printed(
    components: Components, config: ValidationConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    list(images.draw_items(components, validation.plan(config, seed=7)[:1], resolution=RESOLUTION, device=CPU))
    assert capfd.readouterr() == ("", "")


def test_latest_is_by_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        folder = validation.step_folder(tmp_path, step)
        folder.mkdir(parents=True)
        line = {"step": step, "pair": 0, "prompt": "", "file_name": "a.png", "conditioning_image_file_name": "c.png"}
        (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    validation.step_folder(tmp_path, 2_000_000).mkdir()  # not finished
    assert [result.step for result in validation.latest(tmp_path)] == [1_000_000]
    assert validation.latest(tmp_path / "nothing") == []
