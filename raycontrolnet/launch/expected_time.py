"""The work of a run, and its time and cost on a device, as `raycontrolnet check` says them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.latents.manifest import SHARD_ROWS
from raycontrolnet.launch.checked_device import Device
from raycontrolnet.launch.needs import work
from raycontrolnet.model.graphs import has_graphs
from raycontrolnet.predict.devices import PYTHON_S_PER_CALL, REACHED
from raycontrolnet.predict.prediction import Prediction
from raycontrolnet.text import counted, decimals, duration, short_number
from raycontrolnet.training.schedule import Schedule

SHARES = f"{REACHED[0]:.0%} to {REACHED[1]:.0%}"


@dataclass(frozen=True)
class Work:
    """The work of a run."""

    train: TrainConfig
    prediction: Prediction
    schedule: Schedule
    rows_to_encode: int
    """Rows for the latent cache; 0 if there is none, or if the run goes on from the one that it has."""

    @property
    def samples(self) -> int:
        return self.schedule.total_updates * self.schedule.samples_per_update

    @property
    def images_to_encode(self) -> int:
        return self.rows_to_encode * (2 if self.train.random_flip else 1)

    def encoding_seconds(self, tflops: float) -> tuple[float, float]:
        """Return the least and the most time of encoding on devices of this peak in fp32; it comes before training."""
        workers = min(self.schedule.num_workers, math.ceil(self.rows_to_encode / SHARD_ROWS))
        return _seconds(self.images_to_encode * self.prediction.encoding_flop, max(1, workers) * tflops)

    def training_seconds(self, tflops: float, *, least: float) -> tuple[float, float]:
        """Return the least and the most time of training on devices of this peak; `least` seconds go to each step."""
        fast, slow = _seconds(self.samples * self.prediction.flop_per_sample, self.schedule.num_workers * tflops)
        steps = self.schedule.batches_per_worker(0)
        return max(fast, steps * least), max(slow, steps * least)

    def python_seconds(self, device: Device) -> float:
        """Return the time in which Python asks a GPU for a step; 0 where nobody waits for it, or it is not known."""
        if not device.is_gpu or self.prediction.has_graphs or self.train.compile:
            return 0.0
        return self.prediction.dispatches * PYTHON_S_PER_CALL


def _seconds(flop: float, tflops: float) -> tuple[float, float]:
    slow, fast = (flop / (tflops * 1e12 * share) for share in REACHED)
    return fast, slow


def work_lines(run: Work, device: Device, price_per_hour: float | None) -> Iterator[str]:
    """Yield the run's work, and its time and cost if the device's peak is known."""
    each = work(run.prediction.flop_per_sample)
    yield f"\nwork: {counted(run.schedule.total_updates, 'update')}, {counted(run.samples, 'sample')} of {each} each"
    if encodes := run.rows_to_encode > 0:
        both = " (both ways, for --random_flip)" if run.train.random_flip else ""
        images, each = counted(run.images_to_encode, "image"), work(run.prediction.encoding_flop)
        yield f"encoding: {images}{both} of {each} each, in fp32; less what a cache already has"
    if device.tflops is None or device.fp32_tflops is None:
        what = "time" if price_per_hour is None else "time and cost"
        yield f"{what}: not known without the device; --device_tflops 312, of its data sheet, gives a range"
        return
    total = trained = run.training_seconds(device.tflops, least=(python := run.python_seconds(device)))
    if encodes:
        encoded = run.encoding_seconds(device.fp32_tflops)
        yield f"  encoding takes {_durations(encoded)}, at {SHARES} of {device.fp32_tflops:.3g} TFLOP/s"
        total = encoded[0] + trained[0], encoded[1] + trained[1]
    rates = _to(*(short_number(run.samples / seconds, 3) for seconds in reversed(trained)))
    also = "with the encoding, then " if encodes else ""
    yield f"time: {_durations(total)}, {also}{rates} images/s, at {SHARES} of {device.tflops:g} TFLOP/s"
    if trained[0] > run.training_seconds(device.tflops, least=0)[0]:
        yield f"  it waits for Python, {python:.2g} s a step whatever its batch: {_less_waiting(run)} makes it faster"
    if price_per_hour is not None:
        priced = "GPU" if device.is_gpu else "worker"
        costs = (seconds / 3600 * run.schedule.num_workers * price_per_hour for seconds in total)
        workers = counted(run.schedule.num_workers, priced)
        yield f"cost: {_to(*(decimals(cost, 2) for cost in costs))}, for {workers} at {price_per_hour:g} an hour"


def _less_waiting(run: Work) -> str:
    graphs = replace(run.train, cuda_graphs="on")
    captured = has_graphs(graphs, on_gpu=True, num_workers=run.train.most_workers)
    return "--cuda_graphs on or a larger batch" if captured else "a larger batch"


def _durations(seconds: tuple[float, float]) -> str:
    return _to(*map(duration, seconds))


def _to(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"
