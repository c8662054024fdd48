"""Training from cached latents: the same learning as from pixels, exactly resumed, without VAE or image files."""

from __future__ import annotations

import dataclasses
import io
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from runs import Settings, check_resume_is_exact, losses, metadata, run

from raycontrolnet import RunResult, TrainConfig, fit, prepare
from raycontrolnet.data import transforms
from raycontrolnet.errors import ConfigError, UserError
from raycontrolnet.latents.cache import read_row
from raycontrolnet.launch.preflight import check, choose_latents
from raycontrolnet.model.components import load_components
from raycontrolnet.model.performance import vae_on
from raycontrolnet.storage.folder import cache_folder
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training.status import read_status


@pytest.fixture
def settings(tiny_settings: Settings, tmp_path: Path) -> Settings:
    return tiny_settings | {"cache_latents": "on", "latents_cache_dir": str(tmp_path / "cache")}


def test_the_losses_are_those_from_pixels(settings: Settings, tmp_path: Path) -> None:
    changed = {"max_train_steps": 20, "checkpointing_steps": 100, "proportion_empty_prompts": 0.3}
    pixels = losses(run(settings, tmp_path / "pixels", **changed, cache_latents="off"))
    for dtype, tolerance in (("float16", 1e-3), ("float32", 1e-5)):
        dtyped = {"latents_dtype": dtype, "latents_cache_dir": str(tmp_path / dtype)}
        cached = losses(run(settings, tmp_path / f"from {dtype}", **changed, **dtyped))
        assert len(set(cached)) == 20
        assert cached == pytest.approx(pixels, rel=tolerance)
        assert cached != pixels, "from the cache?"
        assert read_status(tmp_path / f"from {dtype}")["latents_cache"] == str(tmp_path / dtype)


def test_a_named_vae_that_is_the_base_models_own(settings: Settings, tmp_path: Path) -> None:
    """Its cache is the same, and so is all that is learned."""
    made = prepare(TrainConfig(**settings), stream=io.StringIO())
    vae = Path(settings["pretrained_model_name_or_path"], "vae")
    named = settings | {"pretrained_vae_model_name_or_path": str(shutil.copytree(vae, tmp_path / "vae"))}
    result = prepare(TrainConfig(**named), stream=io.StringIO())
    assert (made.num_encoded, result.num_encoded) == (13, 0)
    outs = [run(given, tmp_path / name, cache_latents="off") for name, given in (("own", settings), ("named", named))]
    assert losses(outs[0]) == losses(outs[1])


def test_resume_is_exact(settings: Settings, tmp_path: Path) -> None:
    """The run stops after 2 of 8 updates, in the middle of an epoch."""
    changed = {"train_batch_size": 2, "max_train_steps": 8, "checkpointing_steps": 2}
    check_resume_is_exact(settings, tmp_path, **changed)


def test_neither_vae_nor_images_are_needed_once_the_cache_is_there(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(TrainConfig(**settings), stream=io.StringIO())

    def never(*_: object, **__: object) -> None:
        raise AssertionError("from the cache, nothing is encoded and no image file decoded")

    monkeypatch.setattr(AutoencoderKL, "encode", never)
    monkeypatch.setattr(transforms, "decode_rgb", never)
    assert len(losses(run(settings, tmp_path / "out"))) == 4


@pytest.mark.parametrize(
    ("changed", "cached"),
    [
        ({"max_train_steps": None, "num_train_epochs": 1, "train_batch_size": 13}, False),
        ({"max_train_steps": 3}, False),  # 12 of 13 samples
        ({"max_train_steps": None, "num_train_epochs": 1, "train_batch_size": 7}, False),  # 14 of 13
        ({"max_train_steps": 4}, True),  # 16
        ({"max_train_steps": 2, "gradient_accumulation_steps": 2}, True),
        ({"max_train_steps": None, "num_train_epochs": 2}, True),
        ({"max_train_steps": 1, "cache_latents": "on"}, True),
        ({"max_train_steps": 8, "cache_latents": "off"}, False),
        ({"max_train_steps": 1, "on_bad_sample": "skip"}, True),
    ],
)
def test_auto_caches_what_is_used_more_than_once(
    settings: Settings, tmp_path: Path, changed: Settings, cached: bool
) -> None:
    checked = check(TrainConfig(**settings | {"cache_latents": "auto"} | changed), RunFolder(str(tmp_path / "out")))
    assert (choose_latents(checked, io.StringIO()).latents is not None) == cached


def test_a_longer_run_that_is_resumed_may_begin_to_cache(settings: Settings, tmp_path: Path) -> None:
    settings |= {"cache_latents": "auto", "checkpointing_steps": 1}
    pixels = run(settings, tmp_path / "pixels", max_train_steps=6, cache_latents="off")
    out = run(settings, tmp_path / "out", max_train_steps=3)
    assert losses(out) == losses(pixels)[:3]
    run(settings, out, max_train_steps=6, resume_from_checkpoint="latest")
    assert (tmp_path / "cache" / "manifest.json").exists()
    assert losses(out) == pytest.approx(losses(pixels), rel=1e-3)


def test_a_run_goes_on_from_the_cache_that_it_has(settings: Settings, tmp_path: Path) -> None:
    """Also where it alone would use no image twice: losses are those of the run that was not stopped, bit for bit."""
    settings |= {"cache_latents": "auto"}
    whole = run(settings, tmp_path / "whole")
    start = str(whole / "checkpoint-2")
    shorter = run(settings, tmp_path / "shorter", max_train_steps=3, resume_from_checkpoint=start)
    assert losses(shorter) == losses(whole)[2:3]
    pixels = run(settings, tmp_path / "pixels", max_train_steps=3, resume_from_checkpoint=start, cache_latents="off")
    assert losses(pixels) != losses(shorter)
    others = Path(shutil.copytree(settings["train_data_dir"], tmp_path / "others"))
    del settings["latents_cache_dir"]
    changed = {"resume_from_checkpoint": start, "train_data_dir": str(others), "max_train_steps": 3}
    record = read_status(run(settings, tmp_path / "of others", **changed))
    assert record["latents_cache"] is None, "one pass over other data needs none"


@pytest.mark.parametrize(("changed", "cached"), [({}, False), ({"latents_cache_dir": "another"}, True)])
def test_a_run_goes_on_without_the_cache_that_it_could_not_have(
    settings: Settings, tmp_path: Path, changed: Settings, cached: bool
) -> None:
    """It had no seed for one, as the run that goes on has; if it is given another place for one it uses that."""
    settings |= {"cache_latents": "auto", "max_train_samples": 5, "seed": None}
    whole = run(settings, tmp_path / "whole")
    changed = {name: str(tmp_path / value) for name, value in changed.items()}
    rest = run(settings, tmp_path / "rest", **changed, resume_from_checkpoint=str(whole / "checkpoint-2"))
    assert (losses(rest) == losses(whole)[2:]) != cached
    assert losses(rest) == pytest.approx(losses(whole)[2:], rel=1e-3)


def test_changed_data_is_refused_with_what_changed_and_the_command(settings: Settings, tmp_path: Path) -> None:
    data = Path(shutil.copytree(settings["train_data_dir"], tmp_path / "data"))
    settings["train_data_dir"] = str(data)
    run(settings, tmp_path / "out")
    lines = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    with pytest.raises(UserError) as caught:
        run(settings, tmp_path / "again")
    message = str(caught.value)
    assert (
        f"the data changed since its latents were cached in {tmp_path / 'cache'}: 14 rows, 13 in the cache" in message
    )
    assert (
        f"raycontrolnet prepare --pretrained_model_name_or_path {settings['pretrained_model_name_or_path']}" in message
    )
    prepare(TrainConfig(**settings), stream=io.StringIO())
    run(settings, tmp_path / "again")


def test_a_cache_that_does_not_fit_is_refused_before_training(settings: Settings, tmp_path: Path) -> None:
    run(settings, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"does not fit this run \(resolution: 32, not 16\)"):
        run(settings, tmp_path / "again", resolution=16)
    assert not (tmp_path / "again").exists()


def test_a_damaged_cache_ends_the_run_before_it_is_trained_on(settings: Settings, tmp_path: Path) -> None:
    run(settings, tmp_path / "out")
    (shard,) = (tmp_path / "cache").glob("*.arrow")
    content = bytearray(shard.read_bytes())
    posterior = read_row(cache_folder(str(shard.parent)), shard.name, 0, 0).posterior.tobytes()
    content[bytes(content).index(posterior)] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(UserError, match=rf"{shard}: this part of the latent cache is damaged \(the checksum of row 0"):
        run(settings, tmp_path / "again", max_train_steps=13, train_batch_size=1)


def test_skipped_samples_are_never_trained_on(settings: Settings, tmp_path: Path) -> None:
    data = Path(shutil.copytree(settings["train_data_dir"], tmp_path / "data"))
    rows = metadata(data)
    (data / rows[4]["image"]).write_bytes(b"")
    shown = io.StringIO()
    config = TrainConfig(
        **settings
        | {"train_data_dir": str(data), "on_bad_sample": "skip", "max_bad_fraction": 0.1, "max_train_steps": None}
        | {"num_train_epochs": 2, "train_batch_size": 1, "output_dir": str(tmp_path / "out")}
    )
    result: RunResult = fit(config, stream=shown)
    assert "latents: 12 samples, 1 bad ones skipped" in shown.getvalue()
    assert "raycontrolnet 0.1.0: 12 samples" in shown.getvalue()
    assert result.step == 24


def test_validation_images_need_the_vae_and_get_it(settings: Settings, tmp_path: Path) -> None:
    image = next(Path(settings["train_data_dir"]).glob("conditioning/*.png"))
    validation = {"validation_prompt": "a circle", "validation_image": str(image), "num_validation_images": 1}
    out = run(settings, tmp_path / "out", **validation, validation_steps=2)
    assert {path.parent.name for path in out.glob("validation/*/pair-00-image-00.png")} == {
        "step-000002",
        "step-000004",
    }


def test_the_vae_is_on_the_device_only_while_it_is_needed(tiny_base: Path) -> None:
    model = TrainConfig(pretrained_model_name_or_path=str(tiny_base), train_data_dir=".")
    components = load_components(
        model, device=torch.device("cpu"), dtype=torch.float32, seed=0, vae_device=torch.device("meta")
    )
    assert components.vae.device.type == "meta"
    assert components.denoiser.device.type == "cpu"
    vae = RecordedVae()
    with vae_on(dataclasses.replace(components, vae=vae), torch.device("cpu")):
        assert vae.device.type == "cpu"
    assert vae.device.type == "meta"


class RecordedVae:
    """Goes where it is told to, as weights on `meta` could not."""

    device = torch.device("meta")

    def to(self, device: torch.device) -> None:
        self.device = device


@pytest.mark.gpu
def test_on_a_gpu_the_vae_waits_on_the_cpu(tiny_base: Path) -> None:
    model = TrainConfig(pretrained_model_name_or_path=str(tiny_base), train_data_dir=".")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    components = load_components(model, device=cuda, dtype=torch.float32, seed=0, vae_device=cpu)
    assert (components.vae.device.type, components.denoiser.device.type) == ("cpu", "cuda")
    with vae_on(components, cuda):
        assert components.vae.device.type == "cuda"
    assert components.vae.device.type == "cpu"


def test_a_random_subset_is_not_cached_again_and_again(settings: Settings, tmp_path: Path) -> None:
    settings |= {"max_train_samples": 5, "seed": None}
    with pytest.raises(ConfigError, match="--max_train_samples=5: needs --seed, to cache these rows"):
        run(settings, tmp_path / "out")
    run(settings, tmp_path / "auto", cache_latents="auto")
    assert not (tmp_path / "cache" / "manifest.json").exists()
    run(settings, tmp_path / "seeded", cache_latents="auto", seed=1)
    assert (tmp_path / "cache" / "manifest.json").exists()


def test_going_on_with_other_samples_left_out_is_told(settings: Settings, tmp_path: Path) -> None:
    data = Path(shutil.copytree(settings["train_data_dir"], tmp_path / "data"))
    row = metadata(data)[4]
    content = (data / row["image"]).read_bytes()
    (data / row["image"]).write_bytes(b"x" * len(content))
    settings |= {"train_data_dir": str(data), "on_bad_sample": "skip", "max_bad_fraction": 0.1}
    out = run(settings, tmp_path / "out", max_train_steps=2)
    (data / row["image"]).write_bytes(content)
    run(settings, out, resume_from_checkpoint="latest")
    assert "was made with other bad samples left out" in (out / "run.log").read_text()
