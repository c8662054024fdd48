"""The held-out measure: what it says, that it never is trained on, and that it changes nothing."""

from __future__ import annotations

import io
import json
import logging
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import draw_timestep, training
from runs import Settings, equal, lines, losses, run, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from raycontrolnet import TrainConfig, fit
from raycontrolnet.config.train_config import public_settings
from raycontrolnet.data.augmentation import View
from raycontrolnet.data.order import Purpose, SampleOrder
from raycontrolnet.data.records import DecodedRow, EncodedRow, PreparedRow
from raycontrolnet.data.sample_rows import PixelRows, SampleRows
from raycontrolnet.data.sources import open_source
from raycontrolnet.data.stream import BatchLoader
from raycontrolnet.data.transforms import encode_conditioning
from raycontrolnet.errors import ConfigError, DataError
from raycontrolnet.model.batch import draw, make_batch
from raycontrolnet.model.step import TrainState, controlnet_loss
from raycontrolnet.training.held_out import KeptSamples, control_appeared, in_words, measure

NUM_ROWS = 13
NUM_HELD_OUT = 5
MEASURED = ("step", "val_loss", "val_loss_shuffled", "control_gap", "control_gap_error")


@pytest.fixture
def settings(tiny_settings: Settings) -> Settings:
    """Measures after updates 2 and 4."""
    return tiny_settings | {"validation_split": NUM_HELD_OUT, "validation_steps": 2}


def measured(output_dir: Path) -> list[list[float]]:
    return [[line[name] for name in MEASURED] for line in lines(output_dir / "validation.jsonl")]


def loader_of(settings: Settings, batch_size: int = 2) -> BatchLoader:
    config = TrainConfig(**settings)
    source = open_source(config)
    order = SampleOrder(len(source), seed=0, num_held_out=NUM_HELD_OUT)
    return BatchLoader(PixelRows(source, config.resolution), order, batch_size, proportion_empty_prompts=0.9)


def shake(state: TrainState) -> None:
    """Weights that the control image reaches: those of a fresh ControlNet end in zeros."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in state.components.controlnet.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))


# --- what is measured ---


def test_it_is_the_mean_of_the_training_loss_with_pinned_draws(settings: Settings) -> None:
    """Computed again sample by sample, each with its own control image and with that of the next one."""
    loader = loader_of(settings)
    with training(settings) as state:
        shake(state)
        found = measure(state, loader)
        components = state.components
        rows = [loader.held_out_sample(index) for index in range(NUM_HELD_OUT)]
        right, shuffled = [], []
        for index, row in enumerate(rows):
            batch = make_batch([row], components, torch.device("cpu"))
            other = make_batch([rows[(index + 1) % NUM_HELD_OUT]], components, torch.device("cpu"))
            draws = draw(0, [index], (4, 4, 4), draw_timestep, torch.device("cpu"), Purpose.HELD_OUT)
            draws = draws._replace(timesteps=torch.tensor([[100, 300, 500, 700, 900][index]]))
            with torch.no_grad():
                right.append(controlnet_loss(components, components.controlnet, batch, draws))
                batch = batch._replace(conditioning_images=other.conditioning_images)
                shuffled.append(controlnet_loss(components, components.controlnet, batch, draws))
    assert found is not None
    gaps = torch.cat(shuffled) - torch.cat(right)
    assert found.val_loss == pytest.approx(float(torch.cat(right).mean()), rel=1e-5)
    assert found.val_loss_shuffled == pytest.approx(float(torch.cat(shuffled).mean()), rel=1e-5)
    assert found.control_gap == pytest.approx(float(gaps.mean()), abs=1e-6)
    assert found.control_gap != 0
    assert found.control_gap_error == pytest.approx(float(gaps.std() / NUM_HELD_OUT**0.5), rel=1e-3)


def test_a_fresh_controlnet_has_no_gap(settings: Settings) -> None:
    """It ends in zero convolutions: no control image changes anything."""
    with training(settings) as state:
        found = measure(state, loader_of(settings))
    assert found is not None
    assert found.control_gap == found.control_gap_error == 0
    assert found.val_loss == found.val_loss_shuffled > 0


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batch_size_does_not_matter(settings: Settings, batch_size: int) -> None:
    with training(settings) as state:
        shake(state)
        one = measure(state, loader_of(settings))
        other = measure(state, loader_of(settings, batch_size))
    assert one is not None
    assert other is not None
    assert other[1:5] == pytest.approx(one[1:5], rel=1e-5, abs=1e-7)


def sums_of_workers(settings: Settings, loader: BatchLoader, world_size: int) -> torch.Tensor:
    """Return what each worker adds up: samples, and their losses, gaps and squared gaps."""
    found: list[torch.Tensor] = []

    def reduce(sums: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        found.append(sums)
        return sums

    with training(settings) as state, pytest.MonkeyPatch.context() as patch:
        shake(state)
        patch.setattr(state.accelerator, "reduce", reduce)
        for rank in range(world_size):
            measure(state, loader, rank=rank, world_size=world_size)
    return torch.stack(found)


def test_the_shares_of_workers_are_the_whole(settings: Settings) -> None:
    """The sums of the workers, added here; test_fit_ray.py has two workers."""
    loader = loader_of(settings)
    with training(settings) as state:
        shake(state)
        whole = measure(state, loader)
    assert whole is not None
    count, right, gap, _, stopped = (
        sums_of_workers(settings, loader, 7).sum(0).tolist()
    )  # two of them have nothing to do
    assert (count, stopped) == (NUM_HELD_OUT, 0)
    assert right / count == pytest.approx(whole.val_loss, rel=1e-6)
    assert gap / count == pytest.approx(whole.control_gap, abs=1e-6)


def test_a_row_that_cannot_be_read_is_left_out(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    loader = loader_of(settings)
    bad = int(loader.order.held_out[2])
    rows = loader.rows

    class Damaged:
        remote, row_bytes = False, 1

        def read(self, row: int, view: View) -> DecodedRow | EncodedRow:
            if row == bad:
                raise DataError("circles/2.png: is damaged")
            return rows.read(row, view)

    damaged = BatchLoader(Damaged(), loader.order, 2, 0.0)
    with training(settings) as state, caplog.at_level(logging.WARNING):
        shake(state)
        found = measure(state, damaged)
    assert found is not None
    # Of five samples 2 is gone, and 1 with it, for want of another's control image.
    losses_of_samples = sums_of_workers(settings, loader, NUM_HELD_OUT)[:, 1]
    assert found.val_loss == pytest.approx(float(losses_of_samples[[0, 3, 4]].mean()), rel=1e-5)
    assert "a held-out sample is left out: circles/2.png: is damaged" in caplog.text


# --- read once ---


class Counting:
    """Rows that count how often each is read; some are damaged."""

    remote, row_bytes = False, 1

    def __init__(self, rows: SampleRows, *damaged: int):
        self.rows, self.damaged = rows, damaged
        self.reads: Counter[int] = Counter()

    def read(self, row: int, view: View) -> DecodedRow | EncodedRow:
        self.reads[row] += 1
        if row in self.damaged:
            raise DataError("circles/2.png: is damaged")
        return self.rows.read(row, view)


def measured_twice(
    settings: Settings, rows: SampleRows, kept: KeptSamples | None
) -> tuple[list[tuple[float, ...]], list[int]]:
    """Return the figures of two measurements with other weights, and how many VAE calls and reads each made."""
    loader = replace(loader_of(settings), rows=Counting(rows))
    figures: list[tuple[float, ...]] = []
    work: list[int] = []
    with training(settings) as state, pytest.MonkeyPatch.context() as patch:
        encode, calls = state.components.vae.encode, [0]

        def counted(images: torch.Tensor) -> Any:
            calls[0] += len(images)
            return encode(images)

        patch.setattr(state.components.vae, "encode", counted)
        for _ in range(2):
            shake(state)
            found = measure(state, loader, kept=kept)
            assert found is not None
            figures.append(found[1:5])
            work += [calls[0], loader.rows.reads.total()]  # type: ignore[attr-defined]
    return figures, work


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_rows_are_read_and_encoded_once(settings: Settings, precision: str) -> None:
    """Bit for bit what they are when they are read for every measurement."""
    settings = settings | {"mixed_precision": precision}
    rows = loader_of(settings).rows
    every_time, work = measured_twice(settings, rows, None)
    assert work == [5, 6, 10, 12]  # the first row comes twice: its control image is that of the last one as well
    once, work = measured_twice(settings, rows, kept := KeptSamples())
    assert work == [5, 6, 5, 6]
    assert once == every_time
    assert once[0] != once[1]
    assert kept.num_samples == NUM_HELD_OUT


def test_cached_rows_are_read_once(settings: Settings) -> None:
    rng = np.random.default_rng(0)
    posteriors = rng.standard_normal((NUM_ROWS, 2, 4, 4, 4)).astype(np.float16)
    pngs = [encode_conditioning(image) for image in rng.integers(0, 256, (NUM_ROWS, 32, 32, 3), dtype=np.uint8)]

    class Cached:
        remote, row_bytes = False, 1

        def read(self, row: int, view: View) -> EncodedRow:
            return EncodedRow(row, posteriors[row], pngs[row], ("a circle",), "")

    every_time, work = measured_twice(settings, Cached(), None)
    assert work == [0, 6, 0, 12]
    once, work = measured_twice(settings, Cached(), KeptSamples())
    assert work == [0, 6, 0, 6]
    assert once == every_time


def test_as_many_rows_are_kept_as_fit(settings: Settings) -> None:
    a_sample = 32 * 32 * 3 + 2 * 4 * 4 * 4 * 4
    rows = loader_of(settings).rows
    every_time, _ = measured_twice(settings, rows, None)
    some, work = measured_twice(settings, rows, kept := KeptSamples(4 * a_sample))
    assert kept.num_samples == 2, "in whole batches, each with one control image more"
    assert work == [5, 6, 8, 10]
    assert some == every_time


def test_a_row_that_could_not_be_read_is_tried_again(settings: Settings) -> None:
    loader = loader_of(settings)
    counting = Counting(loader.rows, int(loader.order.held_out[3]))
    loader, kept = replace(loader, rows=counting), KeptSamples()
    with training(settings) as state:
        shake(state)
        first = measure(state, loader, kept=kept)
        again = measure(state, loader, kept=kept)
        counting.damaged = ()
        mended, whole = (measure(state, loader, kept=each) for each in (kept, None))
    assert first is not None
    assert again is not None
    assert mended is not None
    assert whole is not None
    assert kept.num_samples == 2
    assert first[1:5] == again[1:5]
    assert mended[1:5] == whole[1:5] != first[1:5]


# --- in a run ---


def test_a_run_reads_its_held_out_rows_once(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, own = list[int](), BatchLoader.held_out_sample

    def counted(loader: BatchLoader, index: int) -> PreparedRow:
        read.append(index)
        return own(loader, index)

    monkeypatch.setattr(BatchLoader, "held_out_sample", counted)
    assert len(measured(run(settings, tmp_path / "out"))) == 2
    assert read == [0, 1, 2, 3, 4, 0]


def test_measuring_changes_nothing(settings: Settings, tmp_path: Path) -> None:
    """Bit for bit: losses and weights with a measurement after every update and with one at the end."""
    often = run(settings, tmp_path / "often", validation_steps=1)
    rarely = run(settings, tmp_path / "rarely", validation_steps=100)
    assert losses(often) == losses(rarely)
    assert equal(weights(often), weights(rarely))
    assert [line[0] for line in measured(often)] == [1, 2, 3, 4]
    assert measured(rarely) == measured(often)[-1:]


def test_what_a_run_leaves(settings: Settings, tmp_path: Path) -> None:
    stream = io.StringIO()
    options = {"output_dir": str(tmp_path / "out"), "report_to": "tensorboard"}
    result = fit(TrainConfig(**settings | options), stream=stream)
    records = lines(tmp_path / "out" / "validation.jsonl")
    assert [record["step"] for record in records] == [2, 4]
    assert all(record["seconds"] > 0 for record in records)
    status = json.loads((tmp_path / "out" / "run.json").read_text())
    last = records[-1]
    for name in ("val_loss", "control_gap"):
        assert status[name] == getattr(result, name) == last[name]
    assert status["control_appeared_at_step"] == result.control_appeared_at_step
    assert status["timings"]["validation_s"] == pytest.approx(sum(r["seconds"] for r in records), rel=0.5)
    assert f"step 4: held-out loss {last['val_loss']:.4f}, control gap" in stream.getvalue()
    assert f"held-out loss: `{last['val_loss']:.4g}`" in (tmp_path / "out" / "README.md").read_text()
    assert status["samples"] == 16
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "train_controlnet")).Reload()
    for name in ("val_loss", "val_loss_shuffled", "control_gap"):
        tracked = [(event.step, event.value) for event in events.Scalars(name)]
        assert tracked == [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in records]


def test_from_the_cache_it_is_the_same(settings: Settings, tmp_path: Path) -> None:
    pixels = run(settings, tmp_path / "pixels")
    options = {"cache_latents": "on", "latents_cache_dir": str(tmp_path / "cache"), "latents_dtype": "float32"}
    cached = run(settings, tmp_path / "cached", **options)
    assert measured(cached)[0] == pytest.approx(measured(pixels)[0], rel=1e-4, abs=1e-6)


def test_a_subset_and_held_out_rows_are_cached_together(settings: Settings, tmp_path: Path) -> None:
    options = {"cache_latents": "on", "latents_cache_dir": str(tmp_path / "cache"), "max_train_samples": 6}
    out = run(settings, tmp_path / "out", **options)
    assert len(measured(out)) == 2
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert sum(shard["num_rows"] for shard in manifest["shards"]) == 6 + NUM_HELD_OUT


def test_a_continued_run_measures_on(settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The split is that of the checkpoint, also if the settings leave it to the default."""
    whole = run(settings, tmp_path / "whole", max_train_steps=8)
    parts = run(settings, tmp_path / "parts", max_train_steps=6)
    run(settings, parts, max_train_steps=8, validation_split=None, resume_from_checkpoint="checkpoint-4")
    assert measured(parts) == measured(whole)
    assert losses(parts) == losses(whole)
    assert "was made with" not in caplog.text


def test_another_split_is_noticed(settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = run(settings, tmp_path / "out")
    run(settings, out, max_train_steps=5, validation_split=0, resume_from_checkpoint="latest")
    assert "was made with other rows held out: it has seen rows that are measured now" in caplog.text
    assert not (out / "validation.jsonl").exists(), "it tells of other rows"


def test_an_earlier_runs_measurement_is_not_this_ones(settings: Settings, tmp_path: Path) -> None:
    out = run(settings, tmp_path / "out")
    for path in [*out.glob("checkpoint-*"), *out.glob("*.safetensors")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = fit(TrainConfig(**settings | {"output_dir": str(out), "validation_split": 0}), stream=io.StringIO())
    assert result.val_loss is None
    assert "val_loss" not in json.loads((out / "run.json").read_text())
    assert "held-out loss" not in (out / "README.md").read_text()


# --- which rows ---


def test_a_share_is_one_of_the_rows_that_are_used(tiny_settings: Settings) -> None:
    config = TrainConfig(**tiny_settings | {"validation_split": 0.1, "max_train_samples": 100})
    assert config.num_held_out(10**6) == 10


@pytest.mark.parametrize("max_samples", [None, 3, 8, 100])
def test_held_out_rows_are_never_trained_on(max_samples: int | None) -> None:
    order = SampleOrder(NUM_ROWS, 0, max_samples, num_held_out=NUM_HELD_OUT)
    trained = {order.row(k) for k in range(3 * order.num_samples)}
    assert len(trained) == order.num_samples == min(max_samples or NUM_ROWS, NUM_ROWS - NUM_HELD_OUT)
    assert len(set(order.held_out.tolist())) == NUM_HELD_OUT
    assert not trained & set(order.held_out.tolist())


def test_they_are_drawn_by_the_seed_and_without_bad_rows() -> None:
    held_out_rows = SampleOrder(100, 0, num_held_out=10).held_out.tolist()
    assert held_out_rows == SampleOrder(100, 0, 50, num_held_out=10).held_out.tolist()
    assert held_out_rows != SampleOrder(100, 1, num_held_out=10).held_out.tolist()
    bad = held_out_rows[3]
    assert bad not in SampleOrder(100, 0, without=[bad], num_held_out=10).held_out
    assert SampleOrder(100, 0, without=[bad], num_held_out=10).num_samples == 90


@pytest.mark.parametrize(
    ("split", "num_rows", "held_out_rows"),
    [
        (None, 319, 0),
        (None, 320, 16),
        (None, 10**6, 16),
        (0, 1000, 0),
        (0.1, 1000, 100),
        (0.001, 50, 2),
        (40, 1000, 40),
    ],
)
def test_how_many(tiny_settings: Settings, split: float | None, num_rows: int, held_out_rows: int) -> None:
    assert TrainConfig(**tiny_settings | {"validation_split": split}).num_held_out(num_rows) == held_out_rows


@pytest.mark.parametrize("split", [-0.1, 1, 2.5, float("inf")])
def test_splits_that_mean_nothing(tiny_settings: Settings, split: float) -> None:
    with pytest.raises(ConfigError, match=r"--validation_split=.*: must be a fraction below 1, a count of at least 2"):
        TrainConfig(**tiny_settings | {"validation_split": split})


def test_a_split_that_leaves_nothing(tiny_settings: Settings, tmp_path: Path) -> None:
    config = TrainConfig(**tiny_settings | {"validation_split": 13, "output_dir": str(tmp_path / "out")})
    with pytest.raises(ConfigError, match="--validation_split=13: leaves none of the 13 rows to train on"):
        fit(config, stream=io.StringIO())


def test_the_number_is_written_down(settings: Settings, tmp_path: Path) -> None:
    out = run(settings, tmp_path / "out", validation_split=0.4)
    manifest = json.loads((out / "checkpoint-4" / "manifest.json").read_text())
    assert manifest["held_out"] == 5
    assert manifest["settings"]["validation_split"] == 0.4
    assert public_settings(TrainConfig(**settings))["validation_split"] == 5


# --- in words ---


def record(step: int, gap: float, error: float = 0.001, val_loss: float = 0.2) -> dict[str, float]:
    return {"step": step, "control_gap": gap, "control_gap_error": error, "val_loss": val_loss}


@pytest.mark.parametrize(
    ("gaps", "step"),
    [
        ([], None),
        ([0.0, 0.0], None),
        ([0.0, 0.01], 2),
        ([0.01, 0.0, 0.01, 0.02], 3),  # a fluke at first
        ([0.01, 0.02, 0.0], None),
        ([0.0, 0.0019], None),  # less than twice its error
        ([0.0, -0.01], None),
    ],
)
def test_when_control_appeared(gaps: list[float], step: int | None) -> None:
    assert control_appeared([record(index + 1, gap) for index, gap in enumerate(gaps)]) == step


def test_a_tiny_gap_is_no_control_however_sure() -> None:
    assert control_appeared([record(1, 0.0019, error=1e-6)]) is None


def test_in_words() -> None:
    assert (
        in_words([record(100, 0.0001)])
        == "held-out loss 0.2000, control gap 0.0001 ± 0.002 (2 standard errors): no control yet"
    )
    records = [record(100, 0.0), record(200, 0.012), record(300, 0.034)]
    expected = "held-out loss 0.2000, control gap 0.034 ± 0.002 (2 standard errors): control has appeared at step 200"
    assert in_words(records) == expected
    records = [record(100, 1e-8, error=1e-9)]
    assert in_words(records).endswith(", control gap <2e-7 ± <4e-7 (2 standard errors): no control yet")
    assert in_words([{**record(1, 0.0), "val_loss": 2e-6}]).startswith("held-out loss 2e-6, control gap 0 ± ")
