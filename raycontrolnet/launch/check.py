"""`raycontrolnet check`: what a run will need, by configurations alone; no weights are read, and nothing is trained."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TextIO

import torch

from raycontrolnet.config.check_config import CheckConfig
from raycontrolnet.config.checks import collected, find_token, missing_extras
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.sources import open_source
from raycontrolnet.errors import ConfigError, UserError
from raycontrolnet.launch.precision import resolve
from raycontrolnet.launch.preflight import wants_latents
from raycontrolnet.model.base_family import base_family, size_problems
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.files import ModelFiles
from raycontrolnet.model.loading import BASE
from raycontrolnet.model.performance import has_bf16, working_precision
from raycontrolnet.model.problems import model_problems
from raycontrolnet.model.single_file import base_files
from raycontrolnet.predict.devices import REACHED, peak_of
from raycontrolnet.predict.prediction import GIB, MIB, RESERVED, Prediction, predict
from raycontrolnet.predict.shapes import shaped
from raycontrolnet.text import counted, duration, file_size, short_number
from raycontrolnet.training.room import final_bytes
from raycontrolnet.training.schedule import Schedule, due_steps

LATENT_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True)
class Device:
    """The device that a run is predicted for, as far as it is known."""

    name: str | None
    bytes: float | None
    tflops: float | None

    @staticmethod
    def of(config: CheckConfig) -> Device:
        """Return the device that the settings describe, or else the GPU here."""
        name, memory, tflops = None, config.device_memory, config.device_tflops
        if torch.cuda.is_available():
            found = torch.cuda.get_device_properties(0)
            name = found.name if memory is None else None
            memory = memory or found.total_memory / GIB
            if tflops is None and (peak := peak_of(found.name)):
                dtype = working_precision(config.train.mixed_precision)
                tflops = peak.of(dtype, allow_tf32=config.train.allow_tf32)
        return Device(name, memory * GIB if memory else None, tflops)


def in_precision_of_device(config: CheckConfig) -> TrainConfig:
    """Return the settings of the run with its precision on the device that is described, or else on the one here."""
    train, described = config.train, config.device_memory is not None
    is_gpu = train.use_gpu is not False and (described or config.device_tflops is not None or torch.cuda.is_available())
    bf16 = has_bf16 if torch.cuda.is_available() and not described else lambda: True  # as all GPUs since 2020
    precision, _ = resolve(train.mixed_precision, None, use_gpu=is_gpu, has_bf16=bf16)
    return replace(train, mixed_precision=precision)


def check(config: CheckConfig, stream: TextIO | None = None) -> Prediction:
    """Predict what a run needs, and write it to `stream`, by default the standard output.

    Raises:
        ConfigError: with the problems of models and data together.
        UserError: if the base model's configuration cannot be read.
    """
    stream = stream or sys.stdout
    train = in_precision_of_device(config)
    config, token = replace(config, train=train), find_token(train.hub_token)
    problems, source = list(missing_extras(train)), None
    problems += model_problems(train, token)
    with collected(problems):
        source = open_source(train, cache_dir=train.cache_dir, token=token, skip_bad=train.on_bad_sample == "skip")
    family = base_family(train, token) if not problems else None
    problems += size_problems(train, family)
    if problems or source is None:
        raise ConfigError(problems)
    if family is None:
        name = train.pretrained_model_name_or_path
        raise UserError(f"--{BASE}={name}: its configuration cannot be looked at now; download it, or try again")
    rows = len(source) - train.num_held_out(len(source))
    schedule = Schedule.of(train, min(rows, train.max_train_samples or rows), train.most_workers)
    cached = wants_latents(train, schedule)
    vae = _vae_files(train, token)
    base = base_files(train, token, (f"{family.denoiser}/config.json",), from_cache=True)
    dtype, device = working_precision(train.mixed_precision), Device.of(config)
    with shaped(family, base, train, vae=vae, dtype=dtype) as components:
        prediction = predict(components, train, cached=cached)
        advice = None
        if device.bytes and not prediction.fits(train.train_batch_size, device.bytes):
            checkpointed = predict(components, replace(train, gradient_checkpointing=True), cached=cached)
            advice = _advice(prediction, checkpointed, train, device.bytes)
    lines = [
        *_run_lines(family, train, schedule, cached=cached),
        *_memory_lines(prediction, train.train_batch_size),
        *_device_lines(prediction, train.train_batch_size, device, advice),
        *_work_lines(prediction, schedule, device, config.price_per_hour),
        *_disk_lines(prediction, train, schedule, len(source), cached=cached),
    ]
    stream.write("\n".join(lines) + "\n")
    return prediction


def _vae_files(train: TrainConfig, token: str | None) -> ModelFiles | None:
    name = train.pretrained_vae_model_name_or_path
    if name is None:
        return None
    model = replace(train, pretrained_model_name_or_path=name, base_config=None)
    return base_files(model, token, ("config.json",), from_cache=True)


def _advice(prediction: Prediction, checkpointed: Prediction, train: TrainConfig, device_bytes: float) -> str:
    """Return what makes a run fit that does not."""
    size, tried = train.train_batch_size, []
    if not train.gradient_checkpointing:
        tried.append(("--gradient_checkpointing", checkpointed))
    if not train.use_8bit_adam:
        tried.append((" ".join(["--use_8bit_adam", *(flag for flag, _ in tried)]), checkpointed.with_8bit_adam()))
    for flags, other in tried:
        if other.fits(size, device_bytes):
            return f"{flags} brings it to {_memory(other.total(size))}"
    last = tried[-1][1] if tried else prediction
    flags = f" with {tried[-1][0]}" if tried else ""
    fitting = [part for part in range(1, size) if size % part == 0 and last.fits(part, device_bytes)]
    if fitting:
        steps = size // fitting[-1] * train.gradient_accumulation_steps
        return f"--train_batch_size {fitting[-1]} --gradient_accumulation_steps {steps} fits{flags}"
    return f"no batch fits{flags}: take a smaller --resolution, or a device with more memory"


def _run_lines(family: Family, train: TrainConfig, schedule: Schedule, *, cached: bool) -> Iterator[str]:
    precision = {"no": "fp32"}.get(train.mixed_precision or "no", train.mixed_precision)
    what = f"{family.title}, {train.resolution} px, {precision}, from {'cached latents' if cached else 'pixels'}"
    workers = counted(schedule.num_workers, "worker")
    yield f"{what}: {workers} x batch {schedule.batch_size} x accumulation {schedule.accumulation_steps}"


def _memory_lines(prediction: Prediction, batch_size: int) -> Iterator[str]:
    yield "\nmemory of a worker's device"
    for name, number in prediction.weights.items():
        size = prediction.frozen_bytes.get(name, prediction.trained_bytes.get(name))
        yield _row(name, _memory(size) if size else "on the CPU", f"{short_number(number, 3)} weights")
    for name in ("gradients", "optimizer"):
        yield _row(name, _memory(prediction.trained_bytes[name]))
    each = prediction.activations_per_sample
    per_sample = f"{each / GIB:.2f} GiB a sample" if each >= 0.1 * GIB else f"{_memory(each)} a sample"
    yield _row("activations", _memory(prediction.activations(batch_size)), per_sample)
    yield _row("together", _memory(prediction.total(batch_size)), "CUDA and its kernels need 1 to 3 GiB more")


def _device_lines(prediction: Prediction, batch_size: int, device: Device, advice: str | None) -> Iterator[str]:
    if device.bytes is None:
        yield "\ndevice: no GPU here; --device_memory 24 says what fits one of 24 GiB"
        return
    what = device.name or "the device"
    need, has = _memory(prediction.total(batch_size)), _memory(device.bytes)
    if advice:
        yield f"\ndevice: batch {batch_size} needs {need}, {what} has {has}: {advice}"
    elif prediction.fits(batch_size, device.bytes, RESERVED):
        largest = prediction.largest_batch(device.bytes)
        yield f"\ndevice: fits; the largest batch for {what} with {has} is {largest}"
    else:
        yield f"\ndevice: batch {batch_size} needs {need} and what CUDA needs; {what} with {has} may just have it"


def _work_lines(
    prediction: Prediction, schedule: Schedule, device: Device, price_per_hour: float | None
) -> Iterator[str]:
    samples = schedule.total_updates * schedule.samples_per_update
    flop = prediction.flop_per_sample * samples
    of_one = prediction.flop_per_sample
    each = f"{of_one / 1e12:.2f} TFLOP" if of_one >= 1e11 else f"{of_one / 1e9:.2f} GFLOP"
    yield f"\nwork: {counted(schedule.total_updates, 'update')}, {counted(samples, 'sample')} of {each} each"
    if device.tflops is None:
        what = "time" if price_per_hour is None else "time and cost"
        yield f"{what}: not known without the device; --device_tflops 312, of its data sheet, gives a range"
        return
    slow, fast = (flop / (schedule.num_workers * device.tflops * 1e12 * share) for share in REACHED)
    rates = " to ".join(f"{samples / seconds:.3g}" for seconds in (slow, fast))
    yield (
        f"time: {duration(fast)} to {duration(slow)}, {rates} images/s, at {REACHED[0]:.0%} to {REACHED[1]:.0%} of "
        f"{device.tflops:g} TFLOP/s"
    )
    if price_per_hour is not None:
        low, high = (seconds / 3600 * schedule.num_workers * price_per_hour for seconds in (fast, slow))
        yield f"cost: {low:.2f} to {high:.2f}, for {counted(schedule.num_workers, 'GPU')} at {price_per_hour:g} an hour"


def _disk_lines(
    prediction: Prediction, train: TrainConfig, schedule: Schedule, rows: int, *, cached: bool
) -> Iterator[str]:
    trained = prediction.trained_bytes
    one = trained["ControlNet"] + trained["optimizer"]
    number = len(due_steps(train.checkpointing_steps, schedule.total_updates, schedule.total_updates))
    if train.checkpoints_total_limit is not None:
        number = min(number, train.checkpoints_total_limit)
    kept = f"{counted(number, 'checkpoint')} of {file_size(one)}: {file_size(number * one)}"
    yield f"disk: {kept}; final weights {file_size(final_bytes(trained['ControlNet'], train))}"
    if cached:
        latents = 2 * prediction.latents * LATENT_BYTES[train.latents_dtype]  # mean and log-variance
        yield f"cache: {file_size(latents)} of latents a row, {file_size(rows * latents)}, and the conditioning images"


def _row(name: str, size: str, more: str = "") -> str:
    return f"  {name:<13} {size:>10}  {more}".rstrip()


def _memory(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / MIB:.1f} MiB"
