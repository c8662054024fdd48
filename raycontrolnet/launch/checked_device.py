"""The device that `raycontrolnet check` predicts a run for: the one that is described, or else the one here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from raycontrolnet.cluster.session import runs_on_a_cluster
from raycontrolnet.config.check_config import CheckConfig
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.launch import precision
from raycontrolnet.launch.needs import memory_size
from raycontrolnet.launch.worker_memory import WorkerMemory, host_share
from raycontrolnet.model.performance import has_bf16, working_precision
from raycontrolnet.predict.devices import Peak, peak_of, peak_with
from raycontrolnet.predict.prediction import GIB


@dataclass(frozen=True)
class Device:
    """The device that a run is predicted for, as far as it is known."""

    name: str | None
    bytes: float | None
    """Memory of each worker."""
    tflops: float | None
    is_gpu: bool = True
    refuses: bool = True
    """False for this machine's CPU, which may swap: there `train` warns of a run that cannot fit, and tries it."""
    peak: Peak | None = None
    """Peaks of a GPU in all precisions, as far as `tflops` is known."""

    @property
    def words(self) -> str:
        return self.name or "the device"

    @property
    def fp32_tflops(self) -> float | None:
        """Peak in fp32 without TF32; of a CPU, which has one figure for all, that."""
        return self.peak.fp32 if self.peak else self.tflops

    @staticmethod
    def of(config: CheckConfig, num_workers: int = 1) -> Device:
        """Return the device that the settings describe, or else the one here; a CPU's memory is all workers'."""
        memory, tflops = config.device_memory, config.device_tflops
        if not is_for_gpu(config):
            if memory is not None:
                described = WorkerMemory(memory * GIB / num_workers, is_gpu=False, share=1 / num_workers)
                return Device(described.words_of("the machine"), described.bytes, tflops, is_gpu=False)
            if runs_on_a_cluster(config.train):
                return Device(None, None, tflops, is_gpu=False)
            here = host_share(num_workers)
            return Device(here.words, here.bytes, tflops, is_gpu=False, refuses=False)
        name = peak = None
        dtype, allow_tf32 = working_precision(config.train.mixed_precision), config.train.allow_tf32
        if torch.cuda.is_available():
            found = torch.cuda.get_device_properties(0)
            name = found.name if memory is None else None
            memory = memory or found.total_memory / GIB
            peak = peak_of(found.name)
        if tflops is not None:
            peak = peak_with(tflops, dtype, allow_tf32=allow_tf32)
        elif peak is not None:
            tflops = peak.of(dtype, allow_tf32=allow_tf32)
        return Device(name, memory * GIB if memory else None, tflops, peak=peak)


def in_precision_of_device(config: CheckConfig) -> TrainConfig:
    """Return the settings of the run with its precision on the device that is described, or else on the one here."""
    train, described = config.train, config.device_memory is not None
    bf16 = has_bf16 if torch.cuda.is_available() and not described else lambda: True  # as all GPUs since 2020
    chosen, _ = precision.resolve(train.mixed_precision, None, use_gpu=is_for_gpu(config), has_bf16=bf16)
    return replace(train, mixed_precision=chosen)


def is_for_gpu(config: CheckConfig) -> bool:
    """Check whether the device that is described, or else the one here, is a GPU."""
    described = config.device_memory is not None or config.device_tflops is not None
    here = described or torch.cuda.is_available()
    return here if config.train.use_gpu is None else config.train.use_gpu


def device_in_words(config: CheckConfig, device: Device) -> str:
    """Return the device whose layers and default precision are counted, and why it is that one."""
    if not is_for_gpu(config):
        if config.train.use_gpu is None:
            return "the CPU, as there is no GPU here; --device_memory 24 counts for a GPU of 24 GiB"
        of = "" if config.device_memory is None else f", of a machine of {memory_size(config.device_memory * GIB)}"
        return f"the CPU (--use_gpu False){of}"
    if config.device_memory is not None:
        return f"a GPU of {memory_size(config.device_memory * GIB)} (--device_memory)"
    if torch.cuda.is_available():
        return f"the GPU here, {device.words}"
    if config.device_tflops is not None:
        return f"a GPU of {config.device_tflops:g} TFLOP/s (--device_tflops)"
    return "a GPU (--use_gpu True); there is none here"
