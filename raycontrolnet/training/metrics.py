"""metrics.jsonl: one line per optimizer update, the run's own record. The progress line and reports read it."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np

from raycontrolnet.storage.files import check_open, replace_text

if TYPE_CHECKING:
    from torch import Tensor

METRICS_FILE = "metrics.jsonl"
LEFT_OUT_FILE = "left_out.jsonl"
"""The updates that were not taken: step, and why."""

RATE_WINDOW_S = 30.0
MIN_UPDATES_FOR_RATE = 3


class UpdateMetrics(NamedTuple):
    """One line of metrics.jsonl; `loss` and `grad_norm` may still be tensors on the device."""

    step: int
    loss: float | Tensor
    """Mean over workers and accumulation."""
    lr: float
    grad_norm: float | Tensor
    """Before clipping."""
    samples: int
    """k after this update."""
    images_per_second: float
    """All workers together, this update alone."""
    time: float
    """Unix seconds at the update's end."""

    @property
    def problem(self) -> str | None:
        """Sentence on a loss or gradient norm that is not finite, without its full stop: the update was not taken."""
        for name, value in (("loss", self.loss), ("gradient norm", self.grad_norm)):
            if not math.isfinite(value):
                return f"The {name} is {value} at update {self.step} (learning rate {self.lr:g}), which was not taken"
        return None


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file, without a last line that was cut short."""
    return read_from(path, 0)[0] if path.is_file() else []


def read_from(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Return the whole lines from byte `offset` on, and the offset after them."""
    with path.open("rb") as file:
        file.seek(offset)
        whole = file.read().rpartition(b"\n")[0]
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole) + (1 if whole else 0)


def recent_rate(samples: Sequence[float], rates: Sequence[float]) -> float:
    """Return images per second of the last `RATE_WINDOW_S` of training alone, without validations and checkpoints.

    Args:
        samples: k after each update, at least one.
        rates: images_per_second of each update.
    """
    if len(samples) < MIN_UPDATES_FOR_RATE:
        return rates[-1]
    # Not the mean or the median of the rates: slow updates take more of the time.
    counts = np.diff(samples)[::-1]
    seconds = np.cumsum(counts / np.asarray(rates[1:])[::-1])
    last = min(int(np.searchsorted(seconds, RATE_WINDOW_S)), len(seconds) - 1)
    return float(counts[: last + 1].sum() / seconds[last])


class MetricsLog:
    """A metrics file open for appending.

    Opening it drops the lines after `step`: a restart does those updates again.
    """

    def __init__(self, output_dir: Path, step: int, name: str = METRICS_FILE):
        path = output_dir / name
        kept = [json.dumps(record) + "\n" for record in read(path) if record["step"] <= step]
        replace_text(path, "".join(kept))
        self._path = path
        self._file: TextIO = path.open("a", encoding="utf-8")

    def append(self, record: Mapping[str, Any]) -> None:
        check_open(self._path)
        self._file.write(json.dumps(dict(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Tail:
    """The lines that are added to a metrics file from now on."""

    def __init__(self, path: Path):
        self.path = path
        self._file, self._offset = self._stat()

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the lines since the last call, and whether the run restarted, so that earlier ones no longer count."""
        file, size = self._stat()
        if file is None:
            return [], False
        restarted = file != self._file or size < self._offset
        if restarted:
            self._file, self._offset = file, 0
        records, self._offset = read_from(self.path, self._offset)
        return records, restarted

    def _stat(self) -> tuple[int | None, int]:
        """Return identity and bytes of the file, which a restarted run replaces by one with fewer lines."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None, 0
        return found.st_ino, found.st_size


class PendingMetrics:
    """Updates whose figures are still on the device.

    Reading a figure waits for the device, so on a GPU they are read together, about once a second.
    """

    def __init__(self, interval_s: float, samples_per_update: int):
        self.interval_s, self.samples_per_update = interval_s, samples_per_update
        self._pending: list[UpdateMetrics] = []
        self._flushed_at = time.monotonic()

    def add(self, update: UpdateMetrics) -> None:
        self._pending.append(update)

    def restart_clock(self) -> None:
        """Leave out of the next update's time what came since the last, such as a checkpoint."""
        self._flushed_at = time.monotonic()

    def ready(self, *, force: bool = False) -> list[UpdateMetrics]:
        """Return the updates so far, if it is time or `force`."""
        if not force and time.monotonic() - self._flushed_at < self.interval_s:
            return []
        updates = [one._replace(loss=float(one.loss), grad_norm=float(one.grad_norm)) for one in self._pending]
        self._pending = []
        elapsed, self._flushed_at = time.monotonic() - self._flushed_at, time.monotonic()
        if self.interval_s and updates:
            # A GPU's updates end long after their launch: they can only be timed together.
            mean_rate = len(updates) * self.samples_per_update / elapsed
            updates = [update._replace(images_per_second=mean_rate) for update in updates]
        return updates


class PhaseClock:
    """Seconds by phase (model, data wait, step, checkpoint, ...), for run.json."""

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        """Continue from `before`, which `rounded` gave."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.seconds.update({name.removesuffix("_s"): seconds for name, seconds in (before or {}).items()})

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start

    def rounded(self) -> dict[str, float]:
        return {f"{phase}_s": round(seconds, 3) for phase, seconds in self.seconds.items()}
