"""Models kept from one run to the next: read once, and every run as if it were the only one of its process."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from reference import write_trained_controlnet
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from raycontrolnet import TrainConfig, fit, train_controlnet
from raycontrolnet.demo.base_model import write_random_base
from raycontrolnet.errors import UserError
from raycontrolnet.model import kept
from raycontrolnet.model.components import Components, enable_memory_savers, load_components
from raycontrolnet.model.kept import forget_models, keep_models
from raycontrolnet.model.step import TrainState
from raycontrolnet.run import state as run_state

Settings = dict[str, Any]
CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
BASE = {"CLIPTextModel", "CLIPTokenizer", "UNet2DConditionModel", "AutoencoderKL", "DDPMScheduler"}


@pytest.fixture
def keeping() -> Iterator[None]:
    keep_models()
    yield
    forget_models()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of what is read with `from_pretrained`, in order."""
    found: list[str] = []

    def recording(cls: Any, read: Callable[..., Any]) -> Callable[..., Any]:
        def from_pretrained(*args: Any, **options: Any) -> Any:
            found.append(cls.__name__)
            return read(*args, **options)

        return from_pretrained

    classes: list[Any] = [CLIPTextModel, CLIPTokenizer, UNet2DConditionModel, AutoencoderKL, DDPMScheduler]
    for cls in (*classes, ControlNetModel):
        monkeypatch.setattr(cls, "from_pretrained", recording(cls, cls.from_pretrained))
    return found


@pytest.fixture
def own_base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base that may be changed."""
    return Path(shutil.copytree(tiny_base, tmp_path / "own_base"))


def load(settings: Settings, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Components:
    return load_components(TrainConfig(**settings), device=CPU, dtype=dtype, seed=seed, **options)


def checksum(*modules: torch.nn.Module) -> str:
    """Of all weights and buffers: names, dtypes and bits."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in module.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def processors(module: torch.nn.Module) -> dict[str, type]:
    return {name: type(layer.processor) for name, layer in module.named_modules() if hasattr(layer, "processor")}


# --- whole runs ---


def run(settings: Settings, output_dir: Path, **changed: Any) -> Path:
    fit(TrainConfig(**settings | {"output_dir": str(output_dir)} | changed), stream=io.StringIO())
    return output_dir


def left(output_dir: Path) -> dict[str, Any]:
    """All that a run computes: losses, measurements, pictures and weights."""
    found: dict[str, Any] = {"weights": (output_dir / WEIGHTS).read_bytes()}
    for name, unlike in (("metrics.jsonl", ("time", "images_per_second")), ("validation.jsonl", ("time", "seconds"))):
        if (output_dir / name).exists():
            lines = [json.loads(line) for line in (output_dir / name).read_text().splitlines()]
            found[name] = [{key: line[key] for key in line if key not in unlike} for line in lines]
    pictures = {path.relative_to(output_dir): path.read_bytes() for path in sorted(output_dir.rglob("*.png"))}
    return found | {"pictures": pictures}


def pictures_of(circles: Path) -> Settings:
    """Measures and draws after updates 2 and 4."""
    image = json.loads((circles / "metadata.jsonl").read_text().splitlines()[0])["conditioning_image"]
    return {
        "validation_split": 4,
        "validation_steps": 2,
        "validation_prompt": ["red circle"],
        "validation_image": [str(circles / image)],
    }


CASES: dict[str, tuple[Settings, Settings]] = {
    "another learning rate": ({}, {}),
    "bf16": ({"mixed_precision": "bf16"}, {"mixed_precision": "bf16"}),
    "bf16 after fp32": ({}, {"mixed_precision": "bf16"}),
    "fp32 after bf16": ({"mixed_precision": "bf16"}, {}),
    "gradient checkpointing after none": ({}, {"gradient_checkpointing": True}),
    "none after gradient checkpointing": ({"gradient_checkpointing": True}, {}),
    "another seed": ({"seed": 1}, {}),
    "another seed in bf16": ({"seed": 1, "mixed_precision": "bf16"}, {"mixed_precision": "bf16"}),
    "from cached latents after pixels": ({}, {"cache_latents": "on"}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_after_another_is_as_alone(case: str, tiny_settings: Settings, tmp_path: Path) -> None:
    first, second = CASES[case]
    settings = tiny_settings | {"latents_cache_dir": str(tmp_path / "latents")}
    alone = left(run(settings, tmp_path / "alone", **second))
    keep_models()
    try:
        run(settings, tmp_path / "first", **{"learning_rate": 1e-2, **first})
        after = left(run(settings, tmp_path / "after", **second))
    finally:
        forget_models()
    assert after == alone
    assert len(alone["metrics.jsonl"]) == 4
    assert after["weights"] != left(tmp_path / "first")["weights"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_measures_and_pictures_are_as_alone(
    precision: str, tiny_settings: Settings, circles: Path, tmp_path: Path
) -> None:
    settings = tiny_settings | pictures_of(circles) | {"mixed_precision": precision}
    alone = left(run(settings, tmp_path / "alone"))
    keep_models()
    try:
        run(settings, tmp_path / "first", learning_rate=1e-2)
        after = left(run(settings, tmp_path / "after"))
    finally:
        forget_models()
    assert after == alone
    assert len(alone["validation.jsonl"]) >= 2
    assert len(alone["pictures"]) >= 2
    assert after["pictures"] != left(tmp_path / "first")["pictures"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_that_goes_on_is_as_alone(
    precision: str, tiny_settings: Settings, tmp_path: Path, reads: list[str], keeping: None
) -> None:
    """A trial that was stopped, continued after another one; and a new one after it."""
    settings = tiny_settings | {"mixed_precision": precision}
    forget_models()
    straight = left(run(settings, tmp_path / "straight"))
    keep_models()
    run(settings, tmp_path / "stopped", max_train_steps=2)
    run(settings, tmp_path / "other", learning_rate=1e-2)
    reads.clear()
    assert left(run(settings, tmp_path / "stopped", resume_from_checkpoint="latest")) == straight
    assert left(run(settings, tmp_path / "again")) == straight
    assert not BASE & set(reads)
    assert "ControlNetModel" in reads


def test_runs_that_start_from_a_controlnet(
    tiny_settings: Settings, tiny_base: Path, tmp_path: Path, reads: list[str], keeping: None
) -> None:
    """It is read each time; a run that then needs the UNet's own weights, which are rounded, has them read again."""
    start = str(write_trained_controlnet(tiny_base, tmp_path / "start"))
    bf16 = torch.bfloat16
    alone = load(tiny_settings, dtype=bf16)
    forget_models()
    keep_models()
    named = tiny_settings | {"controlnet_model_name_or_path": start}
    load(named, dtype=bf16)
    reads.clear()
    again = load(named, dtype=bf16).controlnet
    assert reads == ["ControlNetModel"]
    assert checksum(again) == checksum(ControlNetModel.from_pretrained(start))
    assert checksum(load(tiny_settings, dtype=bf16).controlnet) == checksum(alone.controlnet)
    assert set(reads) > BASE
    reads.clear()
    load(tiny_settings, dtype=bf16)
    load(named, dtype=bf16)
    assert reads == ["ControlNetModel"]
    other = write_random_base(tmp_path / "other", "small")
    with pytest.raises(UserError, match="made for another base model"):
        load(named | {"pretrained_model_name_or_path": str(other)})


# --- what is kept ---


def test_the_second_load_reads_nothing(tiny_settings: Settings, reads: list[str], keeping: None) -> None:
    first = load(tiny_settings)
    assert set(reads) == BASE
    reads.clear()
    second = load(tiny_settings, vae_device=CPU)
    assert reads == []
    assert second.unet is first.unet
    assert second.vae is first.vae
    assert second.text_encoder is first.text_encoder
    assert second.controlnet is not first.controlnet
    assert second.tokenizer is not first.tokenizer


def test_nothing_is_kept_unless_it_is_asked_for(tiny_settings: Settings, reads: list[str], tmp_path: Path) -> None:
    run(tiny_settings, tmp_path / "one", max_train_steps=1)
    assert kept._kept is None
    components = load(tiny_settings)
    gone = [weakref.ref(module) for module in (*components.frozen(), components.controlnet)]
    del components
    gc.collect()
    assert [ref() for ref in gone] == [None] * 4
    reads.clear()
    load(tiny_settings)
    assert set(reads) == BASE


def test_forgotten_models_are_gone(tiny_settings: Settings, reads: list[str], keeping: None) -> None:
    gone = [weakref.ref(module) for module in load(tiny_settings).frozen()]
    assert None not in [ref() for ref in gone]
    forget_models()
    assert [ref() for ref in gone] == [None] * 3
    reads.clear()
    load(tiny_settings)
    assert set(reads) == BASE
    assert kept._kept is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_controlnet_is_that_of_a_new_process(
    dtype: torch.dtype, tiny_settings: Settings, tmp_path: Path, keeping: None
) -> None:
    """For every seed, of unrounded weights, whatever became of the one before."""
    forget_models()
    expected = {seed: load(tiny_settings, seed, dtype).controlnet for seed in (0, 1)}
    keep_models()
    assert checksum(expected[0]) != checksum(expected[1])
    for seed in (0, 0, 1, 1, 0):
        found = load(tiny_settings, seed, dtype).controlnet
        assert checksum(found) == checksum(expected[seed])
        assert found.training
        assert all(weight.requires_grad and weight.grad is None for weight in found.parameters())
        assert {weight.dtype for weight in found.parameters()} == {torch.float32}
        assert [weight.stride() for weight in found.parameters()] == [
            weight.stride() for weight in expected[seed].parameters()
        ]
        assert all(weight.data_ptr() % 64 == 0 for weight in found.parameters()), "which MKL's rounding depends on"
        assert processors(found) == processors(expected[seed])
        assert dict(found.config) == dict(expected[seed].config)
        with torch.no_grad():
            for weight in found.parameters():
                weight.add_(1)


def test_the_frozen_models_stay_as_they_are(
    tiny_settings: Settings, circles: Path, tmp_path: Path, keeping: None
) -> None:
    """Two runs with everything that uses them."""
    settings = tiny_settings | pictures_of(circles)
    components = load(settings)
    before, where = checksum(*components.frozen()), [weight.data_ptr() for weight in components.unet.parameters()]
    for name in ("one", "two"):
        run(settings, tmp_path / name, learning_rate=1e-2, gradient_checkpointing=name == "one")
    again = load(settings)
    assert again.unet is components.unet
    assert checksum(*again.frozen()) == before
    assert [weight.data_ptr() for weight in again.unet.parameters()] == where
    for module in again.frozen():
        assert not any(weight.requires_grad or weight.grad is not None for weight in module.parameters())
        assert not any(part.training for part in module.modules())


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_memory_savers_of_a_run_are_its_own(
    size: Literal["tiny", "small"], tiny_settings: Settings, tmp_path: Path, keeping: None
) -> None:
    """For heads that are padded, and for heads that are not."""
    tiny_settings["pretrained_model_name_or_path"] = str(write_random_base(tmp_path / "base", size))
    first = load(tiny_settings)
    expected = processors(first.unet)
    enable_memory_savers(first, gradient_checkpointing=True, xformers=False)
    first.unet.set_attn_processor(AttnProcessor())  # in place of xformers', which needs a GPU
    assert first.unet.is_gradient_checkpointing
    assert processors(first.unet) != expected
    again = load(tiny_settings)
    assert again.unet is first.unet
    for module in (again.unet, again.controlnet):
        assert not module.is_gradient_checkpointing
    assert processors(again.unet) == expected


def test_the_tokenizer_has_no_memory(tiny_settings: Settings, keeping: None) -> None:
    first = load(tiny_settings).tokenizer
    expected = len(first("red circle").input_ids)
    first.backend_tokenizer.enable_padding(length=50)
    first.padding_side = "left"
    first.add_tokens(["circle"])
    again = load(tiny_settings).tokenizer
    assert again.backend_tokenizer.padding is None
    assert again.padding_side == "right"
    assert len(again) < len(first)
    assert len(again("red circle").input_ids) == expected


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_nothing_of_the_last_run_is_in_memory(
    precision: str, tiny_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeping: None
) -> None:
    """Its ControlNet, gradients and moments are gone before the next one is made, without a search by Python."""
    settings = tiny_settings | {"mixed_precision": precision}
    gone: list[weakref.ref[Any]] = []
    build_state = run_state.build_state

    def recording(*args: Any, **options: Any) -> TrainState:
        state = build_state(*args, **options)
        weights = list(state.components.controlnet.parameters())
        gone.extend(map(weakref.ref, (state, state.optimizer.optimizer, state.components.controlnet, *weights)))
        return state

    monkeypatch.setattr(train_controlnet, "build_state", recording)
    gc.collect()
    gc.disable()
    try:
        run(settings, tmp_path / "one")
        assert len(gone) > 10
        assert kept._kept is not None
        assert kept.find(kept._kept.identity, initial=True)
        assert [ref() for ref in gone if ref() is not None] == []
    finally:
        gc.enable()


@pytest.mark.gpu
def test_on_a_gpu(tiny_settings: Settings, reads: list[str], keeping: None) -> None:
    """Nothing is read again, and the VAE is where each run wants it."""
    cuda = torch.device("cuda")
    options: Settings = {"device": cuda, "dtype": torch.float16, "seed": 0}
    first = load_components(TrainConfig(**tiny_settings), **options)
    expected = {name: value.cpu() for name, value in first.controlnet.state_dict().items()}
    reads.clear()
    for vae_device in (CPU, cuda):
        again = load_components(TrainConfig(**tiny_settings), vae_device=vae_device, **options)
        assert again.unet is first.unet
        assert again.vae.device.type == vae_device.type
        assert {value.device.type for value in again.controlnet.parameters()} == {"cuda"}
        assert all(torch.equal(value.cpu(), expected[name]) for name, value in again.controlnet.state_dict().items())
    assert reads == []


# --- what takes its place ---


def test_another_base_takes_the_place(
    tiny_settings: Settings, tiny_base_v: Path, monkeypatch: pytest.MonkeyPatch, keeping: None
) -> None:
    """There are never two: the first is gone when the second is read."""
    gone = [weakref.ref(module) for module in load(tiny_settings).frozen()]
    read = UNet2DConditionModel.from_pretrained
    seen: list[Any] = []

    def reading(*args: Any, **options: Any) -> Any:
        seen.append([ref() for ref in gone])
        return read(*args, **options)

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", reading)
    other = load(tiny_settings | {"pretrained_model_name_or_path": str(tiny_base_v)})
    assert seen == [[None] * 3]
    assert other.noise_scheduler.config["prediction_type"] == "v_prediction"
    assert load(tiny_settings).noise_scheduler.config["prediction_type"] == "epsilon"


@pytest.mark.parametrize(
    "change",
    [
        {"revision": "other"},
        {"cache_dir": "elsewhere"},
        {"tokenizer_name": "BASE/tokenizer"},
    ],
)
def test_other_settings_of_the_base_read_it_again(
    change: Settings, tiny_settings: Settings, tiny_base: Path, tmp_path: Path, reads: list[str], keeping: None
) -> None:
    load(tiny_settings)
    reads.clear()
    changed = {name: value.replace("BASE", str(tiny_base)) for name, value in change.items()}
    load(tiny_settings | changed)
    assert set(reads) == BASE
    reads.clear()
    load(tiny_settings | changed, token="hf_other")
    assert reads == []


def test_another_dtype_reads_it_again(tiny_settings: Settings, reads: list[str], keeping: None) -> None:
    unrounded = checksum(load(tiny_settings).unet)
    assert load(tiny_settings, dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    reads.clear()
    assert checksum(load(tiny_settings).unet) == unrounded
    assert set(reads) == BASE


def test_a_base_that_was_changed_on_disk_is_read_again(
    tiny_settings: Settings, own_base: Path, tmp_path: Path, reads: list[str], keeping: None
) -> None:
    settings = tiny_settings | {"pretrained_model_name_or_path": str(own_base)}
    before = checksum(load(settings).unet)
    reads.clear()
    (own_base / "README.md").write_text("is no part of the model")
    assert checksum(load(settings).unet) == before
    assert reads == []
    other = write_random_base(tmp_path / "other", "tiny", seed=1)
    # As sharing a folder does it: another file in its place, of the same size.
    (other / "unet" / WEIGHTS).replace(own_base / "unet" / WEIGHTS)
    components = load(settings)
    assert set(reads) == BASE
    assert checksum(components.unet) != before
    weights = load_file(own_base / "unet" / WEIGHTS)
    assert torch.equal(components.controlnet.conv_in.weight, weights["conv_in.weight"])


def test_a_run_that_fails_leaves_nothing_wrong(tiny_settings: Settings, tmp_path: Path, keeping: None) -> None:
    expected = checksum(load(tiny_settings).controlnet)
    with pytest.raises(UserError, match="cannot be loaded"):
        load(tiny_settings, controlnet_path=str(tmp_path / "missing"))
    with pytest.raises(UserError, match="cannot be loaded"):
        load(tiny_settings | {"pretrained_model_name_or_path": str(tmp_path / "missing")})
    assert checksum(load(tiny_settings).controlnet) == expected
