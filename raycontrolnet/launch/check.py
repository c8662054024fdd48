"""`raycontrolnet check`: what a run will need, by configurations alone; no weights are read, and nothing is trained."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TextIO

from raycontrolnet.config.check_config import CheckConfig
from raycontrolnet.config.checks import (
    check_device,
    collected,
    find_token,
    missing_extras,
    unwritable,
    with_absolute_paths,
)
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.image_sizes import find_buckets
from raycontrolnet.data.mixture import in_words as sources_in_words
from raycontrolnet.errors import ConfigError
from raycontrolnet.latents.inputs import check_inputs
from raycontrolnet.latents.plan import posterior_bytes
from raycontrolnet.launch.checked_device import (
    Device,
    device_in_words,
    in_precision_of_device,
    is_for_gpu,
)
from raycontrolnet.launch.expected_time import Work, work_lines
from raycontrolnet.launch.needs import MAY_BE_KILLED, Needs, StepSpec, count, known_family, memory_size
from raycontrolnet.launch.preflight import no_cache_because, wants_latents
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.optimizers import try_optimizer
from raycontrolnet.predict.prediction import GIB, Prediction, margin
from raycontrolnet.storage.checkpoint import Checkpoint
from raycontrolnet.storage.object_store import ObjectStore
from raycontrolnet.storage.resume import check_holds_no_sweep, resolve
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.storage.stored_folder import run_folder
from raycontrolnet.storage.uri import UNUSABLE, unusable
from raycontrolnet.text import counted, file_size, short_number
from raycontrolnet.training.room import check_room, final_bytes
from raycontrolnet.training.schedule import Schedule


def check_on_stdout(config: CheckConfig) -> Prediction:
    """Predict as `check`, and write it to the standard output: it is the command's result."""
    return check(config, stream=sys.stdout)


def check(config: CheckConfig, *, stream: TextIO | None = None) -> Prediction:
    """Predict what a run needs.

    Args:
        config: all settings.
        stream: where it is said in words; standard error by default.

    Raises:
        ConfigError: with the problems of models and data together; or, after the needs are written, with what `train`
            would refuse of the device and of --output_dir.
        UserError: if the base model's configuration cannot be read.
    """
    stream = stream or sys.stderr
    train = in_precision_of_device(config)
    config, token = replace(config, train=train), find_token(train.hub_token)
    problems = list(missing_extras(train))
    if train.use_gpu is False:
        with collected(problems):
            check_device(False, train, has_gpu=False)
    with collected(problems):
        try_optimizer(train)
    inputs = check_inputs(train, token, problems, skip_bad=train.on_bad_sample == "skip")
    source, family = inputs.source, known_family(inputs.family, train)
    refused: list[str] = []  # after the needs are said
    folder = run_folder(with_absolute_paths(train).output_dir)
    start = _start(train, folder, refused)
    rows = len(source) - train.num_held_out(len(source))
    schedule = Schedule.of(train, min(rows, train.max_train_samples or rows), train.most_workers, start)
    cached = wants_latents(train, schedule, start)
    with collected(refused):
        cached = cached and (start is not None or no_cache_because(train, len(source)) is None)
    buckets = find_buckets(train, source, family.resolution_multiple)
    step = StepSpec(train, token, cached, buckets.sizes if buckets else (), on_gpu=is_for_gpu(config))
    device, prediction = Device.of(config, schedule.num_workers), count(step)
    needs = Needs.of(step, prediction)
    run = Work(train, prediction, schedule, _rows_to_encode(train, len(source), start) if cached else 0)
    lines = [
        *_run_lines(family, train, schedule, cached=cached),
        *([f"data: {sources}"] if (sources := sources_in_words(source, train)) else []),
        *(buckets.table() if buckets else ()),
        *train.without_effect(),
        *_memory_lines(prediction, train.train_batch_size, device_in_words(config, device), on_gpu=device.is_gpu),
        *_device_lines(needs, device),
        *work_lines(run, device, config.price_per_hour),
        *_disk_lines(needs, schedule, len(source), cached=cached),
    ]
    stream.write("\n".join(lines) + "\n")
    refused += _problems_of_machine(needs, device, folder, schedule, start)
    if refused:
        raise ConfigError(refused)
    return prediction


def _problems_of_machine(
    needs: Needs, device: Device, folder: RunFolder, schedule: Schedule, start: Checkpoint | None
) -> list[str]:
    """Return what `train` would refuse of the disk and the device."""
    problems: list[str] = []
    if folder.path.is_dir() and not folder.is_stored:
        with collected(problems):
            weights = needs.prediction.trained_bytes["ControlNet"]
            check_room(folder, weights, schedule, start.step if start else 0, needs.train)
    if device.bytes and device.refuses and (problem := needs.problem(device.bytes, device.words)):
        problems.append(problem)
    return problems


def _start(train: TrainConfig, folder: RunFolder, problems: list[str]) -> Checkpoint | None:
    """Return the checkpoint that the run goes on from, and add what `train` would refuse of the folder to `problems`.

    Creates no folder, and fetches nothing of an object store's.
    """
    if problem := _unwritable(folder):
        problems.append(problem)
    elif not folder.is_stored or train.resume_from_checkpoint is None:
        with collected(problems):
            check_holds_no_sweep(folder)
            return resolve(train.resume_from_checkpoint, folder)
    return None


def _unwritable(folder: RunFolder) -> str | None:
    """Return why results cannot be written to the folder of a run; None if they can."""
    if not folder.is_stored:
        return unwritable(folder.path, "output_dir") if folder.path.exists() else None
    store = ObjectStore(folder.place)
    try:
        was_empty = not store.list()
        store.check_writable()
        if was_empty:
            store.delete_if_empty()
    except UNUSABLE as error:
        return f"--output_dir={folder.shown}: {unusable(error)}"
    return None


def _rows_to_encode(train: TrainConfig, num_rows: int, start: Checkpoint | None) -> int:
    """Return the rows that a cached run encodes: all that it uses, but where it goes on with the cache that it has.

    Others may be cached already. To know that, the VAE's weights would have to be read.
    """
    return 0 if start and start.manifest.get("cached") else min(num_rows, train.num_used(num_rows))


def _run_lines(family: Family, train: TrainConfig, schedule: Schedule, *, cached: bool) -> Iterator[str]:
    precision = {"no": "fp32"}.get(train.mixed_precision or "no", train.mixed_precision)
    what = f"{family.title}, {train.resolution} px, {precision}, from {'cached latents' if cached else 'pixels'}"
    workers = counted(schedule.num_workers, "worker")
    yield f"{what}: {workers} x batch {schedule.batch_size} x accumulation {schedule.accumulation_steps}"


def _memory_lines(prediction: Prediction, batch_size: int, device: str, *, on_gpu: bool) -> Iterator[str]:
    yield f"\nmemory of a worker, counted for {device}"
    for name, number in prediction.weights.items():
        size = prediction.frozen_bytes.get(name, prediction.trained_bytes.get(name))
        yield _row(name, memory_size(size) if size else "on the CPU", f"{short_number(number, 3)} weights")
    for name in ("gradients", "optimizer", "averages"):
        if name in prediction.trained_bytes:
            yield _row(name, memory_size(prediction.trained_bytes[name]))
    if copied := prediction.updating(batch_size):
        beside = "beside CUDA graphs" if prediction.has_graphs else "less the activations, which are gone by then"
        yield _row("update", memory_size(copied), f"a copy of the weights, {beside}")
    if inputs := prediction.graph_inputs(batch_size):
        yield _row("graph inputs", memory_size(inputs), _per_sample(prediction.graph_inputs_per_sample))
    per_sample = _per_sample(prediction.activations_per_sample)
    base = f"{memory_size(prediction.activations(0))} and {per_sample}"
    yield _row("activations", memory_size(prediction.activations(batch_size)), base)
    beside = "CUDA and its kernels need 1 to 3 GiB more" if on_gpu else "Python and its libraries come on top"
    yield _row("together", memory_size(prediction.total(batch_size)), beside)


def _device_lines(needs: Needs, device: Device) -> Iterator[str]:
    if device.bytes is None:
        what = "--device_memory 24 says what fits a GPU"
        if not device.is_gpu:
            what = "--use_gpu False --device_memory 24 says what fits machines"
        yield f"\ndevice: its memory is not known; {what} of 24 GiB"
        return
    batch_size, where = needs.train.train_batch_size, f"{device.words} with {memory_size(device.bytes)}"
    if not needs.fits(device.bytes):
        shortage = needs.shortage(device.bytes, device.words)
        if not device.refuses:
            yield f"\ndevice: warning: {MAY_BE_KILLED}: {shortage}"
            return
        tried = "" if needs.problem(device.bytes) else " (predictions are within 10%: train warns, and tries it)"
        yield f"\ndevice: {shortage}{tried}"
        return
    largest, user = needs.largest_batch(device.bytes), needs.reserved.user
    kept = memory_size(margin(device.bytes, needs.reserved.to_be_sure))
    sure = f"the largest batch for {where} is {largest}, as {kept} are kept for {user} and gaps"
    if needs.prediction.fits(batch_size, device.bytes, needs.reserved.to_be_sure):
        yield f"\ndevice: fits; {sure}"
    else:
        need = f"batch {batch_size} needs {memory_size(needs.memory)} and what {user} needs"
        yield f"\ndevice: {need}; {where} may just have it; to be sure, {sure}"


def _disk_lines(needs: Needs, schedule: Schedule, rows: int, *, cached: bool) -> Iterator[str]:
    train, prediction = needs.train, needs.prediction
    one, number = needs.checkpoint_bytes, needs.num_checkpoints(schedule)
    kept = f"{counted(number, 'checkpoint')} of {file_size(one)}: {file_size(number * one)}"
    yield f"disk: {kept}; final weights {file_size(final_bytes(prediction.trained_bytes['ControlNet'], train))}"
    if cached:
        latents = posterior_bytes(prediction.latents, train.latents_dtype, both=train.random_flip)
        both = " (both ways, for --random_flip)" if train.random_flip else ""
        all_rows = file_size(rows * latents)
        yield f"cache: {file_size(latents)} of latents a row{both}, {all_rows}, and the conditioning images"


def _per_sample(size: float) -> str:
    return f"{size / GIB:.2f} GiB a sample" if size >= 0.1 * GIB else f"{memory_size(size)} a sample"


def _row(name: str, size: str, more: str = "") -> str:
    return f"  {name:<13} {size:>10}  {more}".rstrip()
