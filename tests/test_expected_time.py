"""The time and the cost that `check` says: the arithmetic, on round numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from raycontrolnet import TrainConfig
from raycontrolnet.launch.checked_device import Device
from raycontrolnet.launch.expected_time import Work, work_lines
from raycontrolnet.predict.devices import PEAKS, PYTHON_S_PER_CALL, Peak, peak_with
from raycontrolnet.predict.prediction import Prediction
from raycontrolnet.training.schedule import Schedule

GPU = Device("a GPU", None, 100.0, peak=Peak(100.0, 50.0, 10.0))
PREDICTION = Prediction(
    weights={}, trained=0, frozen_bytes={}, moment_bytes=8, activations_base=0, activations_per_sample=1,
    flop_per_sample=2_100_000_000_000, dispatches=10_000, latents=1, encoding_flop=1_050_000_000_000, has_graphs=True,
)  # fmt: skip
SCHEDULE = Schedule(num_samples=1000, num_workers=4, batch_size=5, accumulation_steps=2, total_updates=100)
"""4,000 samples: 8.4e15 FLOP, 60 to 140 s on 4 of `GPU`."""


def config(**changed: Any) -> TrainConfig:
    settings = {"num_workers": "4", "mixed_precision": "bf16"} | changed
    return TrainConfig(pretrained_model_name_or_path="base", train_data_dir="data", **settings)


def lines(rows: int = 0, device: Device = GPU, schedule: Schedule = SCHEDULE, **changed: Any) -> list[str]:
    return list(work_lines(Work(config(**changed), PREDICTION, schedule, rows), device, 9.0))


def test_time_and_cost_of_training() -> None:
    """Four workers share the time, and each costs."""
    assert lines() == [
        "\nwork: 100 updates, 4,000 samples of 2.10 TFLOP each",
        "time: 1:00 to 2:20, 28.6 to 66.7 images/s, at 15% to 35% of 100 TFLOP/s",
        "cost: 0.60 to 1.40, for 4 GPUs at 9 an hour",
    ]
    one = replace(SCHEDULE, num_workers=1, total_updates=400)
    assert lines(schedule=one)[1:] == [
        "time: 4:00 to 9:20, 7.14 to 16.7 images/s, at 15% to 35% of 100 TFLOP/s",
        "cost: 0.60 to 1.40, for 1 GPU at 9 an hour",
    ]


def test_encoding_comes_before_and_in_fp32() -> None:
    """800 x 1.05 TFLOP at 10 TFLOP/s on four workers: 60 to 140 s; of 32 rows, which are one part, on one of them."""
    assert lines(800)[1:] == [
        "encoding: 800 images of 1.05 TFLOP each, in fp32; less what a cache already has",
        "  encoding takes 1:00 to 2:20, at 15% to 35% of 10 TFLOP/s",
        "time: 2:00 to 4:40, with the encoding, then 28.6 to 66.7 images/s, at 15% to 35% of 100 TFLOP/s",
        "cost: 1.20 to 2.80, for 4 GPUs at 9 an hour",
    ]
    both = lines(400, random_flip=True)
    assert both[1].startswith("encoding: 800 images (both ways, for --random_flip) of 1.05 TFLOP each")
    assert both[2:] == lines(800)[2:]
    assert lines(32)[2].startswith("  encoding takes 0:10 to 0:22,")
    assert lines(33)[2].startswith("  encoding takes 0:05 to 0:12,")
    cpu = lines(800, Device(None, None, 10.0, is_gpu=False))
    assert cpu[2].endswith("at 15% to 35% of 10 TFLOP/s"), "a CPU has one figure"


def test_without_the_device() -> None:
    unknown = lines(800, Device(None, None, None))
    assert [line.split(": ")[0] for line in unknown] == ["\nwork", "encoding", "time and cost"]


@pytest.mark.parametrize(
    ("calls", "changed", "expected", "waits"),
    [
        # 200 steps of each worker, 0.3 to 0.7 s each
        (0.2, {}, "1:00 to 2:20", None),
        (0.4, {}, "1:20 to 2:20", "--cuda_graphs on or a larger batch"),
        (1.0, {}, "3:20", "--cuda_graphs on or a larger batch"),
        (1.0, {"num_workers": "1"}, "3:20", "--cuda_graphs on or a larger batch"),
        (1.0, {"cuda_graphs": "off"}, "3:20", "--cuda_graphs on or a larger batch"),
        (1.0, {"mixed_precision": "no"}, "3:20", "a larger batch"),
        (1.0, {"compile": True}, "1:00 to 2:20", None),
        (1.0, {"has_graphs": True}, "1:00 to 2:20", None),
    ],
)
def test_a_gpu_waits_for_python(calls: float, changed: dict[str, Any], expected: str, waits: str | None) -> None:
    settings = {name: value for name, value in changed.items() if name != "has_graphs"}
    dispatches, graphs = round(calls / PYTHON_S_PER_CALL), changed.get("has_graphs", False)
    work = Work(config(**settings), replace(PREDICTION, dispatches=dispatches, has_graphs=graphs), SCHEDULE, 0)
    _, time, *more = work_lines(work, GPU, None)
    assert time.startswith(f"time: {expected}, ")
    said = f"  it waits for Python, {calls:.2g} s a step whatever its batch: {waits} makes it faster"
    assert more == ([said] if waits else [])
    _, time, *more = work_lines(work, replace(GPU, is_gpu=False, peak=None), None)
    assert (time.startswith("time: 1:00 to 2:20, "), more) == (True, []), "a CPU computes each operator itself"


def test_peaks_of_a_gpu_by_one_of_them() -> None:
    """As `--device_tflops` gives it, for the precision of the run."""
    half, plain = torch.bfloat16, torch.float32
    assert peak_with(121, half, allow_tf32=False) == PEAKS["L4"]
    assert peak_with(125, half, allow_tf32=False) == PEAKS["V100"], "the slower one in fp32"
    assert peak_with(30.3, plain, allow_tf32=False) == PEAKS["L4"]
    assert peak_with(60, plain, allow_tf32=True) == PEAKS["L4"]
    assert peak_with(98.9, half, allow_tf32=False) == pytest.approx((98.9, 49.4, 6.7))
    assert peak_with(6.7, plain, allow_tf32=False) == pytest.approx((98.9, 49.4, 6.7))
