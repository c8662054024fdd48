"""The encoding pass on Ray, and runs from its cache: any number of workers, and `kill -9` in the middle."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from processes import kill_9
from runs import Settings, flags, losses, run

from raycontrolnet import TrainConfig, prepare
from raycontrolnet.demo.shapes import write_shapes
from raycontrolnet.errors import RunError, UserError
from raycontrolnet.latents.manifest import SHARD_ROWS

pytestmark = pytest.mark.usefixtures("_local_ray")

NUM_SHARDS = 20


@pytest.fixture
def settings(tiny_settings: Settings, tmp_path: Path) -> Settings:
    changed = {"num_workers": "1", "cpus_per_worker": 1.0, "cache_latents": "on"}
    return tiny_settings | changed | {"latents_cache_dir": str(tmp_path / "cache")}


def shards_in(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.arrow")}


def test_a_pool_of_encoders_makes_what_one_process_makes(settings: Settings, tmp_path: Path) -> None:
    num_shards = 5
    num_rows = num_shards * SHARD_ROWS
    settings |= {"train_data_dir": str(write_shapes(tmp_path / "data", num_rows, resolution=16)), "resolution": 16}
    shown = io.StringIO()
    result = prepare(TrainConfig(**settings | {"num_workers": "2"}), stream=shown)
    assert result.num_encoded == num_rows
    here = settings | {"num_workers": "0", "latents_cache_dir": str(tmp_path / "here")}
    prepare(TrainConfig(**here), stream=io.StringIO())
    on_ray, in_process = shards_in(settings["latents_cache_dir"]), shards_in(here["latents_cache_dir"])
    assert on_ray.keys() == in_process.keys()
    assert len(on_ray) == num_shards
    assert on_ray == in_process
    assert f"{num_rows}/{num_rows} images" in shown.getvalue()


@pytest.mark.slow
def test_two_workers_learn_from_the_cache_what_one_does(settings: Settings, tmp_path: Path) -> None:
    """Without a sample that is skipped; and what one learns from pixels."""
    data = Path(shutil.copytree(settings["train_data_dir"], tmp_path / "data"))
    bad, content = spoil_the_third(data)
    settings |= {"train_data_dir": str(data), "on_bad_sample": "skip", "max_bad_fraction": 0.1}
    settings |= {"max_train_steps": 8, "checkpointing_steps": 100, "proportion_empty_prompts": 0.3}
    two = losses(run(settings, tmp_path / "two", num_workers="2", train_batch_size=2))
    one = losses(run(settings, tmp_path / "one", num_workers="0"))
    assert len(two) == 8
    assert two == pytest.approx(one, rel=0, abs=1e-5)
    bad.write_bytes(content)
    rows = (data / "metadata.jsonl").read_text().splitlines()
    (data / "metadata.jsonl").write_text("\n".join(rows[:2] + rows[3:]) + "\n")
    pixels = losses(run(settings, tmp_path / "pixels", cache_latents="off", on_bad_sample="fail", num_workers="0"))
    assert pixels == pytest.approx(one, rel=1e-3)
    assert pixels != one


def test_bad_samples_are_listed_and_the_rest_is_there(settings: Settings, tmp_path: Path) -> None:
    data = Path(shutil.copytree(settings["train_data_dir"], tmp_path / "data"))
    spoil_the_third(data)
    settings["train_data_dir"] = str(data)
    with pytest.raises(UserError, match=r"metadata.jsonl:3, conditioning image: .* is empty\n1 of 13 samples cannot"):
        run(settings, tmp_path / "out")
    skipped = settings | {"on_bad_sample": "skip", "max_bad_fraction": 0.1, "num_workers": "0"}
    assert len(losses(run(skipped, tmp_path / "out"))) == 4


def spoil_the_third(data: Path) -> tuple[Path, bytes]:
    """Empty the conditioning image of the third sample; return its path, and what it held."""
    row = json.loads((data / "metadata.jsonl").read_text().splitlines()[2])
    path = data / row["conditioning_image"]
    content = path.read_bytes()
    path.write_bytes(b"")
    return path, content


def test_a_vae_that_cannot_be_loaded_is_the_users_to_mend(settings: Settings, tiny_base: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (base / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    settings["pretrained_model_name_or_path"] = str(base)
    with pytest.raises(UserError, match=rf"--pretrained_model_name_or_path={base}: cannot be loaded \(vae\)"):
        prepare(TrainConfig(**settings), stream=io.StringIO())


def test_a_cache_that_cannot_be_written_fails_with_the_reason(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    # A file name of the cache's is taken by a folder: root may write everywhere else.
    from raycontrolnet.data.sources import open_source
    from raycontrolnet.latents.plan import LatentPlan
    from raycontrolnet.model.families.stable_diffusion import STABLE_DIFFUSION

    config = TrainConfig(**settings)
    (shard,) = LatentPlan.of(config, open_source(config), STABLE_DIFFUSION, None).shards
    (folder / shard.name).mkdir()
    with pytest.raises(RunError, match=r"^.*cache cannot be written to: Is a directory\.\n0 of 13 images"):
        prepare(config, stream=io.StringIO())


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on(settings: Settings, tmp_path: Path) -> None:
    """Kill -9 of the driver and of its Ray; then the same command to the end."""
    data = write_shapes(tmp_path / "data", NUM_SHARDS * SHARD_ROWS, resolution=16)
    settings |= {"train_data_dir": str(data), "resolution": 16}
    folder = settings["latents_cache_dir"]
    kill_9([sys.executable, "-m", "raycontrolnet", "prepare", *flags(settings)], lambda: shards_in(folder))
    before = shards_in(folder)
    assert 0 < len(before) < NUM_SHARDS
    result = prepare(TrainConfig(**settings), stream=io.StringIO())
    assert result.num_samples == NUM_SHARDS * SHARD_ROWS
    assert result.num_encoded == (NUM_SHARDS - len(before)) * SHARD_ROWS
    assert {name: content for name, content in shards_in(folder).items() if name in before} == before
