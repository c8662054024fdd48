"""`prepare` without Ray: what it encodes, what it leaves alone, and what it refuses. On Ray: test_prepare_ray.py."""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from runs import flags, metadata

from raycontrolnet import TrainConfig, prepare
from raycontrolnet.cli import main, parse
from raycontrolnet.data.order import SampleOrder
from raycontrolnet.data.sources import open_source
from raycontrolnet.data.transforms import decode_conditioning, prepare_images
from raycontrolnet.demo.shapes import write_shapes
from raycontrolnet.errors import ConfigError, DataError, Interrupted, RunError, UserError
from raycontrolnet.latents.cache import LatentCache
from raycontrolnet.latents.encoder import LatentEncoder
from raycontrolnet.latents.manifest import SHARD_ROWS, Manifest
from raycontrolnet.latents.plan import LatentPlan
from raycontrolnet.latents.prepare import PrepareResult
from raycontrolnet.launch.preflight import no_cache_because
from raycontrolnet.model.families.stable_diffusion import STABLE_DIFFUSION
from raycontrolnet.storage.folder import CacheFolder

NUM_ROWS = 2 * SHARD_ROWS + 6
Settings = dict[str, Any]
Prepare = Callable[..., PrepareResult]


@pytest.fixture(scope="module")
def _many_circles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("many"), NUM_ROWS, resolution=16)


@pytest.fixture
def data(_many_circles: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_many_circles, tmp_path / "data"))


@pytest.fixture
def settings(tiny_base: Path, data: Path, tmp_path: Path) -> Settings:
    return {
        "pretrained_model_name_or_path": str(tiny_base),
        "train_data_dir": str(data),
        "latents_cache_dir": str(tmp_path / "cache"),
        "resolution": 16,
        "num_workers": "0",
        "use_gpu": False,
    }


@pytest.fixture
def shown() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def run(settings: Settings, shown: io.StringIO) -> Prepare:
    return lambda **changed: prepare(TrainConfig(**settings | changed), stream=shown)


def cache_of(settings: Settings) -> LatentCache:
    config = TrainConfig(**settings)
    plan = LatentPlan.of(config, open_source(config), STABLE_DIFFUSION, None)
    assert plan.manifest is not None
    return LatentCache.of(plan.folder, plan.manifest, plan.shards)


def shards_in(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("*.arrow"))


def spoil(data: Path, row: int, content: bytes = b"not an image") -> Path:
    image = data / metadata(data)[row]["image"]
    image.write_bytes(content)
    return image


def no_encoding(*_: object, **__: object) -> None:
    raise AssertionError("nothing should be encoded")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("float32", 1e-5)])
def test_the_cache_holds_what_the_pixels_give(settings: Settings, run: Prepare, dtype: str, tolerance: float) -> None:
    settings["latents_dtype"] = dtype
    result = run()
    assert (result.num_samples, result.num_encoded, result.bad_samples) == (NUM_ROWS, NUM_ROWS, ())
    assert result.num_bytes == sum(path.stat().st_size for path in Path(result.folder).glob("*.arrow"))
    cache, source = cache_of(settings), open_source(TrainConfig(**settings))
    vae = AutoencoderKL.from_pretrained(settings["pretrained_model_name_or_path"], subfolder="vae")
    rows = range(SHARD_ROWS, SHARD_ROWS + 4)  # one batch of the encoder: what else is in it changes the last digits
    prepared = [prepare_images(source.read(row), 16) for row in rows]
    with torch.no_grad():
        images = torch.from_numpy(np.stack([row.image for row in prepared]))
        posterior = vae.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    expected = torch.stack([posterior.mean, posterior.logvar], dim=1).numpy()
    for index, row in enumerate(rows):
        encoded = cache.read(row)
        assert encoded.posterior.dtype == dtype
        np.testing.assert_allclose(encoded.posterior, expected[index], rtol=tolerance, atol=tolerance)
        assert np.array_equal(decode_conditioning(encoded.conditioning_png), prepared[index].conditioning_image)
        assert encoded.captions == source.read(row).captions


def test_size_is_told_before_and_after(run: Prepare, shown: io.StringIO) -> None:
    result = run()
    text = shown.getvalue()
    assert f"latents: {NUM_ROWS} images at 16 px need about " in text
    assert f"latents: {NUM_ROWS}/{NUM_ROWS} images | " in text
    assert f"images/s | 0:00 left\nlatents: {NUM_ROWS} samples, {result.num_bytes / 1000:.3g} kB in " in text
    told = float(text.split("need about ")[1].split()[0])
    assert told == pytest.approx(result.num_bytes / 1000, rel=0.1)


def test_a_second_time_does_nothing(run: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run().folder
    before = {path: path.stat().st_mtime_ns for path in Path(folder).glob("*.[aj]*")}
    assert len(before) == 4
    monkeypatch.setattr(LatentEncoder, "__init__", no_encoding)
    result = run()
    assert (result.num_encoded, result.num_samples) == (0, NUM_ROWS)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_it_goes_on_where_it_stopped(run: Prepare, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = CacheFolder.write, 0

    def interrupted(folder: CacheFolder, name: str, content: bytes) -> None:
        nonlocal written
        if written == 1:
            raise KeyboardInterrupt
        write(folder, name, content)
        written += 1

    with monkeypatch.context() as patched:
        patched.setattr(CacheFolder, "write", interrupted)
        with pytest.raises(Interrupted) as caught:
            run()
    done = len(shards_in(settings["latents_cache_dir"]))
    assert done == 1
    assert f" of {NUM_ROWS} images are cached and stand" in str(caught.value)
    command = next(line for line in str(caught.value).splitlines() if "raycontrolnet prepare" in line)
    assert f"--train_data_dir {settings['train_data_dir']}" in command
    assert Manifest.read(CacheFolder(settings["latents_cache_dir"])) is None
    result = run()
    assert result.num_samples == NUM_ROWS
    assert result.num_encoded in (NUM_ROWS - SHARD_ROWS, NUM_ROWS - 6)


def test_killed_and_two_at_once(settings: Settings, tmp_path: Path) -> None:
    """One is killed with -9 in the middle; then two do the rest together, and neither harms the other."""
    data = write_shapes(tmp_path / "larger", 20 * SHARD_ROWS, resolution=16)
    settings |= {"train_data_dir": str(data)}
    command = [sys.executable, "-m", "raycontrolnet", "prepare", *flags(settings)]
    folder = settings["latents_cache_dir"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        while not shards_in(folder):
            assert first.poll() is None
            time.sleep(0.01)
        first.kill()
    before = shards_in(folder)
    assert 0 < len(before) < 20
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert f"latents: {20 * SHARD_ROWS} samples, " in errors
    assert len(shards_in(folder)) == 20
    cache = cache_of(settings)
    assert [cache.read(row).row for row in range(len(cache))] == list(range(20 * SHARD_ROWS))


def test_a_full_disk_leaves_what_is_whole(run: Prepare, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, synced = os.fsync, 0

    def full(file: int) -> None:
        nonlocal synced
        synced += 1
        if synced == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(
            RunError, match=r"cache cannot be written to: No space left on device\.\n.* images are cached"
        ):
            run()
    assert len(shards_in(settings["latents_cache_dir"])) == 2
    assert run().num_samples == NUM_ROWS


def test_a_disk_without_room_is_found_before_anything_is_encoded(
    run: Prepare, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CacheFolder, "free_bytes", lambda _: 1000)
    monkeypatch.setattr(LatentEncoder, "__init__", no_encoding)
    with pytest.raises(
        ConfigError, match=r"are needed there and 1 kB free; name a folder with more room, or train from"
    ):
        run()
    assert shards_in(settings["latents_cache_dir"]) == []


@pytest.mark.parametrize("change", [{"resolution": 32}, {"latents_dtype": "float32"}])
def test_a_cache_of_another_kind_is_refused_with_the_command_for_the_right_one(
    run: Prepare, settings: Settings, change: Settings
) -> None:
    folder = run().folder
    before = shards_in(folder)
    with pytest.raises(ConfigError) as caught:
        run(**change)
    message = str(caught.value)
    assert message.startswith(f"--latents_cache_dir={folder}: the cache there does not fit this run (")
    name = next(iter(change)).removeprefix("latents_")
    assert f"{name}: {'float16' if name == 'dtype' else 16}, not {change[next(iter(change))]}" in message
    command = message.splitlines()[-1].split()
    assert command[:2] == ["raycontrolnet", "prepare"]
    assert main([*command[1:], "--num_workers", "0", "--use_gpu", "False"]) == 0
    assert shards_in(folder) == before


def test_another_vae_is_refused(run: Prepare, tiny_base: Path, tmp_path: Path) -> None:
    run()
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    vae = AutoencoderKL.from_pretrained(other, subfolder="vae")
    with torch.no_grad():
        vae.encoder.conv_in.bias += 1e-3
    vae.save_pretrained(other / "vae")
    with pytest.raises(ConfigError, match=r"does not fit this run \(encoded by another VAE\)"):
        run(pretrained_model_name_or_path=str(other))


def test_another_unet_is_none_of_its_business(run: Prepare, tiny_base: Path, tmp_path: Path) -> None:
    run()
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    (other / "unet" / "config.json").write_text("{}")
    assert run(pretrained_model_name_or_path=str(other)).num_encoded == 0


def test_changed_data_is_told_and_only_what_is_new_is_encoded(
    run: Prepare, settings: Settings, data: Path, shown: io.StringIO
) -> None:
    folder = run().folder
    before = shards_in(folder)
    lines = (data / "metadata.jsonl").read_text().splitlines()
    lines[SHARD_ROWS] = json.dumps(json.loads(lines[SHARD_ROWS]) | {"text": "another caption"})
    (data / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    result = run()
    assert result.num_encoded == SHARD_ROWS
    assert f"the data changed since (1 of 3 parts of 32 rows are others; row {SHARD_ROWS} is [" in shown.getvalue()
    assert "1 files of earlier data are still there" in shown.getvalue()
    assert set(before) < set(shards_in(folder))
    assert cache_of(settings).read(SHARD_ROWS).captions == ("another caption",)


def test_bad_samples_fail_at_the_end_with_the_whole_list(
    run: Prepare, data: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, empty = spoil(data, 1), spoil(data, NUM_ROWS - 1, b"")
    with pytest.raises(DataError) as caught:
        run()
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert f"metadata.jsonl:2, image: {broken} is not an image" in lines[0]
    assert f"metadata.jsonl:{NUM_ROWS}, image: {empty} is empty" in lines[1]
    assert lines[2] == (
        f"2 of {NUM_ROWS} samples cannot be used: fix them, or skip them with --on_bad_sample skip. "
        "The others are cached"
    )
    assert Manifest.read(CacheFolder(settings["latents_cache_dir"])) is None
    monkeypatch.setattr(LatentEncoder, "encode", no_encoding)
    with pytest.raises(DataError, match="2 of 70 samples cannot be used"):
        run()
    monkeypatch.undo()
    # mended: only their shards are made again
    for path in (broken, empty):
        Image.new("RGB", (16, 16), "red").save(path)
    assert run().num_encoded == SHARD_ROWS + 6


def test_bad_samples_that_were_mended_without_a_trace_are_looked_at_again(
    run: Prepare, data: Path, settings: Settings
) -> None:
    image = spoil(data, 1)
    image.chmod(0o000)
    content = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(content, "PNG")
    image.chmod(0o644)
    image.write_bytes(b"x" * len(content.getvalue()))
    with pytest.raises(DataError):
        run()
    image.write_bytes(content.getvalue())  # of the same size
    assert run().num_samples == NUM_ROWS
    assert cache_of(settings).read(1).row == 1
    assert cache_of(settings).read(5).row == 5  # the file that is read is the new one


def test_many_bad_samples_are_listed_in_a_file(run: Prepare, data: Path, settings: Settings) -> None:
    for row in range(12):
        spoil(data, row)
    with pytest.raises(DataError, match="12 bad samples") as caught:
        run()
    file = Path(settings["latents_cache_dir"], "bad_samples.txt")
    assert str(file) in str(caught.value)
    assert len(file.read_text().splitlines()) == 12


def test_bad_samples_can_be_skipped_up_to_a_share(
    run: Prepare, data: Path, settings: Settings, shown: io.StringIO
) -> None:
    spoil(data, 1)
    spoil(data, 2)
    with pytest.raises(DataError, match=r"2 of 70 samples cannot be used: more than --max_bad_fraction=0\.01 allows"):
        run(on_bad_sample="skip")
    settings |= {"on_bad_sample": "skip", "max_bad_fraction": 0.03}
    result = run()
    assert result.num_encoded == 0  # the passes before wrote all that can be used
    assert (result.num_samples, [bad.row for bad in result.bad_samples]) == (NUM_ROWS - 2, [1, 2])
    assert f"latents: {NUM_ROWS - 2} samples, 2 bad ones skipped, " in shown.getvalue()
    manifest = Manifest.read(CacheFolder(settings["latents_cache_dir"]))
    assert manifest is not None
    assert [bad.row for bad in manifest.bad_samples] == [1, 2]
    assert cache_of(settings).rows.tolist() == [0, *range(3, NUM_ROWS)]
    with pytest.raises(DataError, match="2 of 70 samples cannot be used"):
        run(on_bad_sample="fail")


def test_missing_files_and_empty_cells_are_bad_samples_like_others(
    run: Prepare, data: Path, settings: Settings
) -> None:
    missing = spoil(data, 1)
    missing.unlink()
    with pytest.raises(DataError, match=rf"metadata.jsonl:2, image: {missing}: no such file\n1 of 70 samples cannot"):
        run()
    result = run(on_bad_sample="skip", max_bad_fraction=0.02)
    assert [bad.row for bad in result.bad_samples] == [1]
    assert result.bad_samples[0].reason.endswith(f"{missing}: no such file")


def test_without_any_good_sample_nothing_is_skipped(run: Prepare, data: Path) -> None:
    for row in range(NUM_ROWS):
        spoil(data, row)
    with pytest.raises(DataError, match="70 of 70 samples cannot be used"):
        run(on_bad_sample="skip", max_bad_fraction=1.0)


def test_latents_that_half_precision_cannot_hold_are_bad_samples(
    run: Prepare, settings: Settings, tiny_base: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    vae = AutoencoderKL.from_pretrained(other, subfolder="vae")
    with torch.no_grad():
        vae.quant_conv.bias[0] += 1e6
    vae.save_pretrained(other / "vae")
    settings["pretrained_model_name_or_path"] = str(other)
    with pytest.raises(DataError, match=r"image: the VAE makes latents that float16 cannot hold; use --latents_dtype"):
        run()
    assert run(latents_dtype="float32", latents_cache_dir=str(tmp_path / "cache32")).num_samples == NUM_ROWS


def test_a_shard_of_the_wrong_size_is_made_again(run: Prepare) -> None:
    folder = Path(run().folder)
    first, second, third = sorted(folder.glob("*.arrow"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-10])
    second.unlink()
    result = run()
    assert result.num_encoded == 2 * SHARD_ROWS
    assert first.read_bytes() == whole
    assert third.exists()


def test_a_subset_is_encoded_alone_and_served_by_a_whole_cache(
    run: Prepare, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="--max_train_samples=5: needs --seed, which decides the rows"):
        run(max_train_samples=5)
    assert run(max_train_samples=5, seed=3).num_encoded == 5
    subset = settings | {"max_train_samples": 5, "seed": 3}
    order = SampleOrder(NUM_ROWS, 3, 5)
    assert {order.row(k) for k in range(5)} == set(cache_of(subset).rows.tolist())
    with pytest.raises(ConfigError, match=r"run \(of 5 rows drawn by --seed 3, not of all rows\)\. Make one"):
        run()
    with pytest.raises(
        ConfigError, match=r"--seed 3, not of 5 rows drawn by --seed 4\)\. Use it with --seed 3, or make"
    ):
        run(max_train_samples=5, seed=4)
    run(latents_cache_dir=str(tmp_path / "whole"))
    monkeypatch.setattr(LatentEncoder, "__init__", no_encoding)
    assert run(latents_cache_dir=str(tmp_path / "whole"), max_train_samples=5, seed=9).num_encoded == 0


def test_the_command_that_uses_the_cache_is_said(
    run: Prepare, shown: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the seed, if the rows depend on it."""
    assert "--seed" not in _command_that_uses(run, shown, latents_cache_dir=str(tmp_path / "whole"))
    subset = {"max_train_samples": 5, "seed": 3, "latents_cache_dir": str(tmp_path / "part")}
    command = _command_that_uses(run, shown, **subset)
    assert " --seed 3" in command
    together = {
        "max_train_samples": NUM_ROWS - 2,
        "validation_split": 2,
        "latents_cache_dir": str(tmp_path / "together"),
    }
    unseeded = parse("train", shlex.split(_command_that_uses(run, shown, **together))[2:])
    assert no_cache_because(unseeded, NUM_ROWS) is None, "all rows are used, whatever the seed"
    monkeypatch.setattr(LatentEncoder, "__init__", no_encoding)
    train = parse("train", shlex.split(command)[2:])
    assert train.cache_latents == "on", "also for a single pass"
    assert prepare(train, stream=io.StringIO()).num_samples == 5


def _command_that_uses(run: Prepare, shown: io.StringIO, **changed: Any) -> str:
    run(**changed)
    *_, said, command = shown.getvalue().splitlines()
    assert said == "latents: train, or tune, uses them with these flags and the run's others:"
    assert command.startswith("  raycontrolnet train --pretrained_model_name_or_path ")
    return command


def test_the_default_folder_is_one_for_each_kind(run: Prepare, data: Path) -> None:
    root = Path(os.environ["XDG_CACHE_HOME"], "raycontrolnet", "latents")
    folders = [Path(run(latents_cache_dir=None, **changed).folder) for changed in ({}, {"resolution": 32}, {})]
    assert folders[0] == folders[2] != folders[1]
    assert folders[0].parent == folders[1].parent == root
    assert folders[0].name.startswith(f"{data.name}-16px-")


def test_an_object_store_will_do(run: Prepare, settings: Settings) -> None:
    settings["latents_cache_dir"] = "mock:///bucket/cache"
    assert run().num_encoded == NUM_ROWS
    assert run().num_encoded == 0
    assert len(cache_of(settings)) == NUM_ROWS


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ("config.json", r"its VAE cannot be read \(.*config"),
        ("diffusion_pytorch_model.safetensors", r"its vae has no weights \(.safetensors\)"),
    ],
)
def test_a_missing_vae_is_named(run: Prepare, tiny_base: Path, tmp_path: Path, part: str, problem: str) -> None:
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    (other / "vae" / part).unlink()
    with pytest.raises(UserError, match=rf"--pretrained_model_name_or_path={other}: {problem}"):
        run(pretrained_model_name_or_path=str(other))


def test_the_command_answers_with_exit_codes(
    settings: Settings, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", *flags(settings)]) == 0
    spoil(data, 0)
    assert main(["prepare", *flags(settings)]) == 2
    error = capsys.readouterr().err
    assert "is not an image in a format that is read" in error
    assert "Traceback" not in error
    with pytest.raises(SystemExit) as left:
        main(["prepare", "--help"])
    assert left.value.code == 0
    assert "--latents_cache_dir" in capsys.readouterr().out
