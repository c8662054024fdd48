"""The needs of a run before it starts: counted by configurations, said in a line, and refused if they cannot fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TextIO

import torch

from raycontrolnet.cluster.machine_memory import host_bytes
from raycontrolnet.config.optimizer_settings import ADAMW
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.records import Size
from raycontrolnet.errors import UserError
from raycontrolnet.model.base_family import base_family
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.files import ModelFiles
from raycontrolnet.model.loading import BASE
from raycontrolnet.model.optimizers import state_bytes_per_weight
from raycontrolnet.model.performance import working_precision
from raycontrolnet.model.single_file import base_files
from raycontrolnet.predict.devices import bytes_of_type
from raycontrolnet.predict.prediction import GIB, LEAST_RESERVED, MIB, RESERVED, Prediction, margin, predict
from raycontrolnet.predict.shapes import shaped
from raycontrolnet.text import counted, file_size
from raycontrolnet.training.schedule import Schedule, due_steps

NO_GRAPHS = "--cuda_graphs off"


@dataclass(frozen=True)
class Needs:
    """The needs of a run's step."""

    train: TrainConfig
    prediction: Prediction
    counted: Callable[..., Prediction]
    """Call it with settings that differ, for the prediction with them; takes seconds."""

    @staticmethod
    def of(
        train: TrainConfig, token: str | None, prediction: Prediction, *, cached: bool,
        sizes: Sequence[Size] = (), on_gpu: bool = False,
    ) -> Needs:  # fmt: skip
        """Return the needs by a prediction that has been made; arguments as of `count`."""
        how: dict[str, Any] = {"cached": cached, "sizes": sizes, "on_gpu": on_gpu}
        return Needs(train, prediction, lambda **changes: count(replace(train, **changes), token, **how))

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
        return self.prediction.fits(self.train.train_batch_size, device_bytes)

    def largest_batch(self, device_bytes: float) -> int:
        """Return the largest batch that fits a device to be sure; 0 if none does."""
        size = self.prediction.largest_batch(device_bytes)
        if not self.train.gradient_checkpointing:
            return size
        # Then a sample takes more in a larger batch, and what is counted at a small one promises too much.
        while size > self.train.train_batch_size:
            there = self.counted(train_batch_size=size)
            if there.fits(size, device_bytes, RESERVED):
                break
            size = min(size - 1, there.largest_batch(device_bytes))
        return size

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
            need += f" and {memory_size(margin(device_bytes, LEAST_RESERVED))} for CUDA and gaps"
        return f"batch {self.train.train_batch_size} needs {need}, {device} has {has}: {self.advice(device_bytes)}"

    def advice(self, device_bytes: float) -> str:
        """Return what makes a run fit that does not."""
        size, steps = self.train.train_batch_size, self.train.gradient_accumulation_steps
        tried: list[tuple[str, Prediction]] = []
        for flags, prediction in self._lighter():
            tried += [(flags, prediction), (f"{flags} {NO_GRAPHS}".strip(), prediction.without_graphs())]
            for found, lighter in tried[-2:]:
                if lighter.fits(size, device_bytes):
                    return f"{found} brings it to {memory_size(lighter.total(size))}"
        parts = [part for part in range(size - 1, 0, -1) if size % part == 0]
        fitting = [next((part for part in parts if each.fits(part, device_bytes)), 0) for _, each in tried]
        part = max(fitting)
        flags, _ = tried[fitting.index(part)] if part else tried[-2]  # the fewest flags for the largest part
        flags = f" with {flags}" if flags else ""
        if part:
            return f"--train_batch_size {part} --gradient_accumulation_steps {size // part * steps} fits{flags}"
        return f"no batch fits{flags}: take a smaller --resolution, or a device with more memory"

    def _lighter(self) -> Iterator[tuple[str, Prediction]]:
        """Yield the run's prediction, and those with more and more of the flags that need less memory."""
        train, prediction, flags = self.train, self.prediction, ""
        yield flags, prediction
        if not train.gradient_checkpointing:
            flags, prediction = "--gradient_checkpointing", self.counted(gradient_checkpointing=True)
            yield flags, prediction
        if not train.use_8bit_adam and train.optimizer == ADAMW:
            yield f"--use_8bit_adam {flags}".strip(), prediction.with_8bit_adam()


def count(
    train: TrainConfig, token: str | None, *, cached: bool, sizes: Sequence[Size] = (), on_gpu: bool = False
) -> Prediction:
    """Predict a run's step by configurations alone; takes seconds.

    Args:
        token: for private models on the Hub.
        cached: the run trains from cached latents.
        sizes: of the buckets; empty for the resolution squared.
        on_gpu: the run's layers are those of a GPU.

    Raises:
        UserError: if a configuration cannot be read.
    """
    family = known_family(base_family(train, token), train)
    base = base_files(train, token, (f"{family.denoiser}/config.json",), from_cache=True)
    dtype = working_precision(train.mixed_precision)
    with shaped(family, base, train, vae=_vae_files(train, token), dtype=dtype) as components:
        prediction = predict(components, train, cached=cached, sizes=sizes, on_gpu=on_gpu)
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


class WorkerMemory(NamedTuple):
    """The memory that a worker has."""

    bytes: float | None
    """None if it is not known."""
    is_gpu: bool
    share: float = 1.0
    """Part of the GPU, or number of workers that share the machine's memory, as 1 / number."""

    @property
    def words(self) -> str:
        if not self.is_gpu:
            return "this machine" if self.share == 1 else f"{self.share:.2g} of this machine"
        return "this GPU" if self.share == 1 else f"{self.share:.2g} of a GPU"


def gpu_bytes(types: Iterable[str | None]) -> float | None:
    """Return the memory of the largest GPU of some of Ray's types; None if one is unknown (None, or not listed)."""
    sizes = [bytes_of_type(kind) if kind else None for kind in types]
    known = [size for size in sizes if size is not None]
    return max(known) if known and len(known) == len(sizes) else None


def gpu_here() -> float | None:
    """Return the memory of this machine's first GPU; None if there is none. It takes a context on that GPU."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def host_share(num_workers: int) -> WorkerMemory:
    """Return the memory of each of the workers on this machine's CPUs."""
    return WorkerMemory(host_bytes() / num_workers, is_gpu=False, share=1 / num_workers)


def say_needs(needs: Needs, schedule: Schedule, memory: WorkerMemory, stream: TextIO) -> str | None:
    """Say in a line what a run needs, and whether it may not fit.

    Returns:
        Why the run is refused, if it cannot fit the GPU. CPUs may swap: there a warning is all.
    """
    size = needs.train.train_batch_size
    where = "each GPU" if memory.is_gpu else "memory for each worker"
    checkpoints = counted(needs.num_checkpoints(schedule), "checkpoint")
    stream.write(
        f"needs: {memory_size(needs.memory)} of {where} at batch {size}, {work(needs.prediction.flop_per_sample)} a "
        f"sample, {checkpoints} of {file_size(needs.checkpoint_bytes)}\n"
    )
    if memory.bytes is None:
        return None
    if not memory.is_gpu:
        if needs.memory > memory.bytes:
            need, has = memory_size(needs.memory), memory_size(memory.bytes)
            stream.write(f"warning: {memory.words} has {has}, and a worker needs {need}: it may be killed, or swap\n")
        return None
    if problem := needs.problem(memory.bytes, memory.words):
        return problem
    if not needs.fits(memory.bytes):
        stream.write(f"warning: it may not fit: {needs.shortage(memory.bytes, memory.words)}\n")
    return None


def work(flop: float) -> str:
    """Return floating-point operations in words."""
    return f"{flop / 1e12:.2f} TFLOP" if flop >= 1e11 else f"{flop / 1e9:.2f} GFLOP"


def memory_size(size: float) -> str:
    """Return bytes of memory in words."""
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / MIB:.1f} MiB"
