"""The needs of a run before it starts: counted by configurations, said in a line, and refused if they cannot fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple, TextIO

from raycontrolnet.config.checks import missing_package
from raycontrolnet.config.optimizer_settings import ADAMW
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.records import Size
from raycontrolnet.errors import UserError
from raycontrolnet.launch.precision import NO, in_words
from raycontrolnet.launch.worker_memory import WorkerMemory
from raycontrolnet.model.base_family import base_family
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.files import ModelFiles
from raycontrolnet.model.loading import BASE
from raycontrolnet.model.optimizers import state_bytes_per_weight
from raycontrolnet.model.performance import working_precision
from raycontrolnet.model.single_file import base_files
from raycontrolnet.predict.prediction import GIB, MIB, OF_CUDA, OF_PYTHON, Prediction, Reserve, margin, predict
from raycontrolnet.predict.shapes import shaped
from raycontrolnet.text import counted, decimals, file_size
from raycontrolnet.training.schedule import Schedule, due_steps

NO_GRAPHS = "--cuda_graphs off"
MAY_BE_KILLED = "the run may be killed, or swap"
"""Warning of a run that a CPU's memory does not hold."""


@dataclass(frozen=True)
class StepSpec:
    """A step whose needs are counted: the settings of its run, and what else decides them. Pickles small."""

    train: TrainConfig
    token: str | None = field(default=None, repr=False)
    """Token for private models on the Hub."""
    cached: bool = False
    """True if the run trains from cached latents."""
    sizes: Sequence[Size] = ()
    """Sizes of the buckets; empty for the resolution squared."""
    on_gpu: bool = False
    """True if the run's layers are those of a GPU."""

    def with_settings(self, **changes: Any) -> StepSpec:
        """Return the step with some of its run's settings changed."""
        return replace(self, train=replace(self.train, **changes))


@dataclass(frozen=True)
class Needs:
    """The needs of a run's step."""

    train: TrainConfig
    prediction: Prediction
    counted: Callable[..., Prediction]
    """Call it with settings that differ, for the prediction with them; takes seconds."""
    reserved: Reserve = OF_CUDA
    """Memory of the device that is not for the step."""

    @staticmethod
    def of(step: StepSpec, prediction: Prediction) -> Needs:
        """Return the needs of a step by its prediction, which has been made."""
        counted = cache(lambda **changes: count(step.with_settings(**changes)))
        return Needs(step.train, prediction, counted, OF_CUDA if step.on_gpu else OF_PYTHON)

    @property
    def memory(self) -> float:
        """Bytes of a worker's device at the run's batch."""
        return self.prediction.total(self.train.train_batch_size)

    @property
    def checkpoint_bytes(self) -> int:
        trained = self.prediction.trained_bytes
        averages = trained["ControlNet"] if "averages" in trained else 0
        return trained["ControlNet"] + trained["optimizer"] + averages

    def num_checkpoints(self, schedule: Schedule) -> int:
        """Return the number of checkpoints that are kept."""
        total = schedule.total_updates
        number, limit = len(due_steps(self.train.checkpointing_steps, total, total)), self.train.checkpoints_total_limit
        return number if limit is None else min(number, limit)

    def fits(self, device_bytes: float) -> bool:
        return self.prediction.fits(self.train.train_batch_size, device_bytes, self.reserved.at_least)

    def largest_batch(self, device_bytes: float) -> int:
        """Return the largest batch that fits a device to be sure; 0 if none does."""
        sure = self.reserved.to_be_sure
        size = self.prediction.largest_batch(device_bytes, sure)
        if not self.train.gradient_checkpointing:
            return size
        # Then a sample takes more in a larger batch: what is counted at one batch promises too much at any other.
        while size > 0:
            there = self._counted_at(size)
            if there.fits(size, device_bytes, sure):
                break
            size = min(size - 1, there.largest_batch(device_bytes, sure))
        return size

    def _counted_at(self, batch_size: int, **changes: Any) -> Prediction:
        """Return the prediction that is exact for `batch_size`, with settings changed to `changes`."""
        if batch_size != self.train.train_batch_size:
            changes["train_batch_size"] = batch_size
        return self.counted(**changes) if changes else self.prediction

    def may_fit(self, batch_size: int, device_bytes: float) -> bool:
        """Check whether a batch fits a device, or may fit if the prediction is too high."""
        # Where memory is short, a run goes on without graphs by itself.
        return not self.prediction.without_graphs().cannot_fit(batch_size, device_bytes)

    def problem(self, device_bytes: float, device: str = "this device") -> str | None:
        """Return why a run is refused on a device; None if it fits, or may fit if the prediction is too high."""
        size = self.train.train_batch_size
        if self.may_fit(size, device_bytes):
            return None
        return f"--train_batch_size={size}: {self.shortage(device_bytes, device)}"

    def shortage(self, device_bytes: float, device: str = "this device") -> str:
        """Return in words that the batch does not fit, and what brings it in."""
        need, has = memory_size(self.memory), memory_size(device_bytes)
        if self.memory <= device_bytes:
            need += (
                f" and {memory_size(margin(device_bytes, self.reserved.at_least))} for {self.reserved.user} and gaps"
            )
        return f"batch {self.train.train_batch_size} needs {need}, {device} has {has}: {self.advice(device_bytes)}"

    def advice(self, device_bytes: float) -> str:
        """Return what makes a run fit that does not; what needs no installation if there is such."""
        ways = list(self._ways())
        for lacks in (False, True):
            if found := self._what_fits([way for way in ways if bool(way.lacks) == lacks], device_bytes):
                return found
        flags = f" with {ways[-2].flags}" if ways[-2].flags else ""  # not --cuda_graphs off, which helps least
        machine = "device" if self.reserved is OF_CUDA else "machine"
        return f"no batch fits{flags}: take a smaller --resolution, or a {machine} with more memory"

    def _what_fits(self, ways: Sequence[_Way], device_bytes: float) -> str | None:
        """Return the first way that brings the whole batch in, or else the largest part of it with the fewest flags."""
        size, steps = self.train.train_batch_size, self.train.gradient_accumulation_steps
        least = self.reserved.at_least
        for way in ways:
            if (lighter := way.at(size)).fits(size, device_bytes, least):
                return f"{way.flags} brings it to {memory_size(lighter.total(size))}{way.note}"
        for part in [part for part in range(size - 1, 0, -1) if size % part == 0]:
            for way in ways:
                # Counted at the whole batch, a smaller one seems to need too little, never too much.
                if all(way.at(each).fits(part, device_bytes, least) for each in (size, part)):
                    accumulation = f"--gradient_accumulation_steps {size // part * steps}"
                    flags = f" with {way.flags}" if way.flags else ""
                    return f"--train_batch_size {part} {accumulation} fits{flags}{way.note}"
        return None

    def _ways(self) -> Iterator[_Way]:
        """Yield the run as it is, and with more and more of the flags that need less memory."""
        train, flags = self.train, ""
        at: _CountAt = cache(self._counted_at) if train.gradient_checkpointing else lambda _: self.prediction
        yield from _Way("", at).and_without_graphs()
        if not train.gradient_checkpointing:
            flags, at = "--gradient_checkpointing", cache(partial(self._counted_at, gradient_checkpointing=True))
            yield from _Way(flags, at).and_without_graphs()
        if self.reserved is OF_CUDA and not train.use_8bit_adam and train.optimizer == ADAMW:
            flags = f"--use_8bit_adam {flags}".strip()
            yield from _Way(
                flags, lambda size: at(size).with_8bit_adam(), missing_package("use_8bit_adam")
            ).and_without_graphs()


_CountAt = Callable[[int], Prediction]


class _Way(NamedTuple):
    """A way to make a run need less memory."""

    flags: str
    at: _CountAt
    """Call it with a batch, for the prediction that is exact for it; may take seconds."""
    lacks: str | None = None
    """Package that it needs and that is not installed, in words."""

    @property
    def note(self) -> str:
        return f" ({self.lacks})" if self.lacks else ""

    def and_without_graphs(self) -> Iterator[_Way]:
        yield self
        flags = f"{self.flags} {NO_GRAPHS}".strip()
        yield self._replace(flags=flags, at=lambda size: self.at(size).without_graphs())


def count(step: StepSpec) -> Prediction:
    """Predict a run's step by configurations alone; takes seconds.

    Raises:
        UserError: if a configuration cannot be read.
    """
    train = step.train
    family = known_family(base_family(train, step.token), train)
    base = base_files(train, step.token, (f"{family.denoiser}/config.json",), from_cache=True)
    dtype = working_precision(train.mixed_precision)
    with shaped(family, base, train, vae=_vae_files(train, step.token), dtype=dtype) as components:
        prediction = predict(components, train, cached=step.cached, sizes=step.sizes, on_gpu=step.on_gpu)
        shapes = [tuple(each.shape) for each in components.controlnet.parameters() if each.requires_grad]
    # Outside, where tensors have data.
    return replace(prediction, moment_bytes=state_bytes_per_weight(train, shapes))


def known_family(family: Family | None, train: TrainConfig) -> Family:
    """Return the family of the base model, which can be told by its configuration alone.

    Raises:
        UserError: if it is None, as where the configuration cannot be read.
    """
    if family is None:
        name = train.pretrained_model_name_or_path
        raise UserError(f"--{BASE}={name}: its configuration cannot be looked at now; download it, or try again")
    return family


def _vae_files(train: TrainConfig, token: str | None) -> ModelFiles | None:
    name = train.pretrained_vae_model_name_or_path
    if name is None:
        return None
    model = replace(train, pretrained_model_name_or_path=name, base_config=None)
    return base_files(model, token, ("config.json",), from_cache=True)


def say_needs(needs: Needs, schedule: Schedule, memory: WorkerMemory, stream: TextIO) -> str | None:
    """Say in a line what a run needs, and whether it may not fit.

    Returns:
        Why the run is refused, if it cannot fit the GPU. CPUs may swap: there a warning is all.
    """
    size = needs.train.train_batch_size
    where = "each GPU" if memory.is_gpu else "memory for each worker"
    precision = in_words(needs.train.mixed_precision or NO, "")
    checkpoints = counted(needs.num_checkpoints(schedule), "checkpoint")
    stream.write(
        f"needs: {memory_size(needs.memory)} of {where} at batch {size} in {precision}, "
        f"{work(needs.prediction.flop_per_sample)} a sample, {checkpoints} of {file_size(needs.checkpoint_bytes)}\n"
    )
    if memory.bytes is None:
        return None
    if not memory.is_gpu:
        if not needs.fits(memory.bytes):
            stream.write(f"warning: {MAY_BE_KILLED}: {needs.shortage(memory.bytes, memory.words)}\n")
        return None
    if problem := needs.problem(memory.bytes, memory.words):
        return problem
    if not needs.fits(memory.bytes):
        stream.write(f"warning: it may not fit: {needs.shortage(memory.bytes, memory.words)}\n")
    return None


def work(flop: float) -> str:
    """Return floating-point operations in words."""
    return f"{flop / 1e12:.2f} TFLOP" if flop >= 1e11 else f"{decimals(flop / 1e9, 2)} GFLOP"


def memory_size(size: float) -> str:
    """Return bytes of memory in words."""
    if size < 0.1 * MIB:
        return f"{size / 1024:.0f} KiB"
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / MIB:.1f} MiB"
