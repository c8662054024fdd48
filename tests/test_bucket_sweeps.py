"""Sweeps over what decides the rows of batches: trials have the buckets and the data of their own settings."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from bucket_data import write_pictures
from runs import Settings

from raycontrolnet import TrainConfig, prepare
from raycontrolnet.cli import main
from raycontrolnet.config.sweep_config import SweepConfig
from raycontrolnet.config.sweepable import cache_settings
from raycontrolnet.data.image_sizes import find_buckets
from raycontrolnet.data.sources import open_source
from raycontrolnet.errors import ConfigError
from raycontrolnet.tune.plan import plan_sweep
from raycontrolnet.tune.records import TrialRecord, read_records, write_record
from raycontrolnet.tune.trial import cache_key


@pytest.fixture
def bucketed(tiny_settings: Settings, tmp_path: Path) -> Settings:
    pictures = write_pictures(tmp_path / "pictures", 33)
    return tiny_settings | {"train_data_dir": str(pictures), "aspect_buckets": True, "validation_split": 6}


def test_trials_of_other_batch_sizes_have_their_own_buckets(bucketed: Settings) -> None:
    train = TrainConfig(**bucketed | {"train_batch_size": 1, "validation_steps": 2})
    plan = plan_sweep(SweepConfig(train=train, space={"train_batch_size": {"choice": [1, 8]}}), io.StringIO())
    sizes = []
    for batch_size in (1, 8):
        found = plan.runs[cache_key({"train_batch_size": batch_size}, buckets=True)].buckets
        own = dataclasses.replace(plan.config.train, train_batch_size=batch_size, seed=0)
        expected = find_buckets(own, open_source(own))
        assert found
        assert expected
        assert (found.sizes, found.num_rows) == (expected.sizes, expected.num_rows)
        sizes.append(found.sizes)
    assert sizes[0] != sizes[1]


@pytest.mark.parametrize("filled", [False, True])
def test_batch_sizes_with_other_buckets_cannot_share_a_named_folder(
    bucketed: Settings, tmp_path: Path, filled: bool
) -> None:
    """They would write over each other's cache. Batch sizes with the same buckets can."""
    cache = str(tmp_path / "latents")
    settings = bucketed | {"cache_latents": "on", "latents_cache_dir": cache, "seed": 0, "validation_steps": 2}
    if filled:
        prepare(TrainConfig(**settings | {"train_batch_size": 1}))
    before = sorted(Path(cache).rglob("*"))

    def planned(*sizes: int) -> object:
        train = TrainConfig(**settings | {"train_batch_size": 1})
        return plan_sweep(SweepConfig(train=train, space={"train_batch_size": {"choice": list(sizes)}}), io.StringIO())

    with pytest.raises(ConfigError, match=r"latents_cache_dir=.*latents: holds one cache, .* batch sizes need 2, as"):
        planned(1, 8)
    assert sorted(Path(cache).rglob("*")) == before
    assert planned(1, 2)


def test_batch_sizes_need_nothing_of_their_own_without_buckets() -> None:
    assert cache_settings(["train_batch_size", "learning_rate"]) == []
    assert cache_settings(["train_batch_size", "aspect_buckets"]) == ["aspect_buckets", "train_batch_size"]


def test_several_sources_are_found_again_by_a_trial_that_goes_on(tmp_path: Path) -> None:
    """trial.json has lists."""
    settings = {"train_data_dir": ("/a", "/b"), "caption_column": ("text", "words"), "learning_rate": 1e-5}
    write_record(tmp_path, TrialRecord(index=0, settings=settings))
    (record,) = read_records(tmp_path)
    assert record.settings == settings
    assert cache_key(record.settings, buckets=False) == cache_key(settings, buckets=False)


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("train", ["--cache_latents", "on"]),
        ("train", ["--on_bad_sample", "skip"]),  # which the cache must have found before the first update
        ("prepare", []),
    ],
)
def test_sizes_that_depend_on_the_seed_need_one(
    command: str, why: list[str], bucketed: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("pretrained_model_name_or_path", "train_data_dir", "output_dir", "validation_split", "resolution")
    given = [text for name in names for text in (f"--{name}", str(bucketed[name]))]
    given += ["--aspect_buckets", "--num_workers", "0", *why]
    assert main([command, *given]) == 2
    assert "--aspect_buckets: needs --seed to cache latents" in capsys.readouterr().err
