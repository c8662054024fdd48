"""A count of a run's needs in a process of its own, beside the start of Ray, so that the run begins no later.

Not in a thread: the count sets torch's default type, which is the whole process's, and asking for a GPU's memory takes
some of it as long as the process lives.
"""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple, TextIO

from raycontrolnet.cluster.session import runs_on_a_cluster
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.errors import ConfigError
from raycontrolnet.launch.needs import Needs, StepSpec, count, say_needs
from raycontrolnet.launch.precision import BF16
from raycontrolnet.launch.worker_memory import WorkerMemory, gpu_bytes, gpu_here, host_share
from raycontrolnet.model.size import controlnet_bytes_at_least
from raycontrolnet.training.schedule import Schedule

logger = logging.getLogger(__name__)

SMALL = 64 * 2**20
"""Bytes of a ControlNet that fits everywhere, such as the demo's: counting it would take longer than starting it."""
PATIENCE_S = 30.0
"""Time that a run waits for the count once Ray has started."""


class CountedNeeds(NamedTuple):
    """The result of the process."""

    needs: Needs
    gpu_here: float | None
    """Memory of this machine's GPU, if it has one."""
    for_gpus: bool
    """True if the layers and the default precision of GPUs were counted; else those of CPUs."""


class CannotFit(ConfigError):
    """A run that cannot fit its GPU.

    Args:
        problem: in words.
        may_fit: checks whether another batch may fit.
    """

    def __init__(self, problem: str, may_fit: Callable[[int], bool]) -> None:
        super().__init__([problem])
        self.may_fit = may_fit


@dataclass
class PendingNeeds:
    """A count under way."""

    _process: subprocess.Popen[bytes] | None
    """None if nothing is counted."""
    _asked: StepSpec
    """The step, of which the process finds precision and device."""
    _output: IO[bytes]
    _log: IO[bytes]

    def say(
        self,
        schedule: Schedule,
        types: Iterable[str | None] | None,
        stream: TextIO,
        *,
        use_gpu: bool,
        share: float = 1.0,
    ) -> None:
        """Say what the run needs once it is counted; see `say_needs`.

        Args:
            types: Ray's types of the GPUs that workers may get; None if workers are on this machine alone.
            share: part of a GPU that each worker gets.

        Raises:
            CannotFit: it cannot fit the GPU.
        """
        if (found := self.result()) is None:
            return
        needs, here, for_gpus = found
        if for_gpus != use_gpu:
            logger.info("needs were counted for %s, and these are others", "GPUs" if for_gpus else "CPUs")
            return
        try:
            if not use_gpu:
                memory = host_share(schedule.num_workers) if types is None else WorkerMemory(None, is_gpu=False)
            else:
                whole = here if types is None else gpu_bytes(types)
                memory = WorkerMemory(whole * share if whole else None, is_gpu=True, share=share)
            problem = say_needs(needs, schedule, memory, stream)
        except Exception:  # as of the advice
            logger.warning("needs could not be said", exc_info=True)
            return
        if problem and (most := memory.bytes):
            raise CannotFit(problem, lambda size: needs.may_fit(size, most))

    def result(self) -> CountedNeeds | None:
        """Wait for the count; None if there is none, or if it fails or takes too long, which stops no run."""
        if self._process is None:
            return None
        try:
            if self._process.wait(PATIENCE_S):
                self._log.seek(0)
                logger.warning("needs could not be counted:\n%s", self._log.read().decode(errors="replace"))
                return None
            self._output.seek(0)
            train, for_gpus, prediction, here = pickle.load(self._output)
            step = replace(self._asked, train=train, on_gpu=for_gpus)
            return CountedNeeds(Needs.of(step, prediction), here, for_gpus)
        except subprocess.TimeoutExpired:
            self._process.kill()  # it would take a CPU from the training
            self._process.wait()
            logger.warning("needs were not counted within %g s after Ray had started", PATIENCE_S)
        except Exception:
            logger.warning("needs could not be counted", exc_info=True)
        return None


@contextmanager
def counting(step: StepSpec, *, wanted: bool = True) -> Iterator[PendingNeeds]:
    """Count the needs of a run beside what is done inside, unless it is small or not `wanted`.

    Args:
        step: of the run; its precision, if it has none, and its device are those that are likely.
    """
    if step.train.use_gpu is None and runs_on_a_cluster(step.train):
        step = step.with_settings(use_gpu=True)  # if these are CPUs, they are not told
    process = None
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as log:
        if wanted and not is_small(step.train):
            try:
                process = _start(pickle.dumps(step), output, log)
            except OSError:
                logger.warning("needs could not be counted", exc_info=True)
        try:
            yield PendingNeeds(process, step, output, log)
        finally:
            if process is not None:
                process.kill()
                process.wait()


def in_likely_precision(train: TrainConfig, *, has_gpu: bool) -> tuple[TrainConfig, bool]:
    """Return the settings in the precision that a run without one will probably have, and whether it will be on GPUs.

    It is known only once the workers' nodes are. All GPUs since 2020 have bf16; an older one needs more. Who names a
    half precision has GPUs, perhaps on other machines than this one.

    Args:
        has_gpu: this machine has one.
    """
    half = train.mixed_precision not in (None, "no")
    for_gpus = has_gpu or half if train.use_gpu is None else train.use_gpu
    if train.mixed_precision is not None:
        return train, for_gpus
    return replace(train, mixed_precision=BF16 if for_gpus else None), for_gpus


def is_small(train: TrainConfig) -> bool:
    """Check whether a run's ControlNet is known to be small."""
    return 0 < controlnet_bytes_at_least(train) < SMALL


def _start(pickled_step: bytes, output: IO[bytes], log: IO[bytes]) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=log,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin
    with suppress(OSError), process.stdin as pipe:  # it may have failed already
        pipe.write(pickled_step)
    return process


def main() -> None:
    """Count the run on the standard input, and write the result to the standard output."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # for what libraries print
    step: StepSpec = pickle.load(sys.stdin.buffer)
    here = gpu_here()
    train, for_gpus = in_likely_precision(step.train, has_gpu=here is not None)
    with output:
        prediction = count(replace(step, train=train, on_gpu=for_gpus))
        pickle.dump((train, for_gpus, prediction, here), output)


if __name__ == "__main__":
    main()
