"""The progress of a run in the terminal, read from its metrics files by the driver: workers need no other channel."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from raycontrolnet.sampling import images, scores
from raycontrolnet.sampling.images import METADATA
from raycontrolnet.text import StatusLine, counted, decimals, duration, short_number
from raycontrolnet.training import held_out, metrics, validation
from raycontrolnet.training.background import repeating
from raycontrolnet.training.schedule import due_steps

LINE_INTERVAL_S = 0.5
SCORES_INTERVAL_S = 3.0
"""Time between two looks into the validation's folders for new scores."""


@contextmanager
def progress(shown: Progress) -> Iterator[None]:
    """Keep `shown` up to date while a run goes on."""
    try:
        with repeating(shown.update, LINE_INTERVAL_S, "progress"):
            yield
    finally:
        shown.update(last=True)
        shown.status.close()


class Progress:
    """Step, loss, learning rate, images/s and time left of a run, and what is printed above that line.

    Args:
        scored: show the scores of validation images too.
        validation_steps: updates between two validations; None without any.
        num_images: images that a validation draws.
    """

    def __init__(
        self,
        output_dir: Path,
        total_steps: int,
        first_step: int,
        stream: TextIO,
        *,
        scored: bool = False,
        validation_steps: int | None = None,
        num_images: int = 0,
    ):
        self.output_dir = output_dir
        self.total_steps = total_steps
        self.first_step = first_step
        self.status = StatusLine(stream)
        self._metrics = metrics.Tail(output_dir / metrics.METRICS_FILE)
        self._held_out = metrics.Tail(output_dir / held_out.HELD_OUT_FILE)
        self._left_out = metrics.Tail(output_dir / metrics.LEFT_OUT_FILE)
        self._measured = first_step
        self._validation_steps = validation_steps
        self._num_images = num_images
        self._validated = 0.0
        """Part of the current validation that is done; 0 at other times."""
        self._step_at = (first_step, time.monotonic())
        self._scored = scored
        self._scores_at = time.monotonic()
        self._seen = self._finished() if scored else {}
        self._updates: deque[dict[str, Any]] = deque(maxlen=10_000)
        self._started = time.monotonic()

    def update(self, *, last: bool = False) -> None:
        """Read what is new, and show it."""
        self._read()
        self._show_measurements()
        if self._scored and (last or time.monotonic() - self._scores_at >= SCORES_INTERVAL_S):
            self._show_scores()
        step = self._updates[-1]["step"] if self._updates else self.first_step
        if step or self.status.live:
            if line := None if last else self._validating(step):
                self.status.show(line, step + self._validated)
            else:
                self.status.show(self.line(), step, last=last)

    def _validating(self, step: int) -> str | None:
        """Return the line while the images of `step` are drawn, for which training may wait; None at other times."""
        if step != self._step_at[0]:
            self._step_at = (step, time.monotonic())
        self._validated, folder = 0.0, validation.step_folder(self.output_dir, step)
        if not (self._updates and self._num_images and self._validation_steps):
            return None
        if step not in due_steps(self._validation_steps, step, self.total_steps) or (folder / METADATA).exists():
            return None
        num_drawn = len(list(folder.glob(images.FILES)))
        self._validated = (num_drawn + 0.5) / (self._num_images + 1)
        drawn = f"image {num_drawn}/{self._num_images}, " if num_drawn else ""
        loss, seconds = self._updates[-1]["loss"], time.monotonic() - self._step_at[1]
        return f"step {step}/{self.total_steps} | loss {decimals(loss)} | validating, {drawn}{seconds:.0f} s"

    def line(self) -> str:
        """Return the line as it stands."""
        if not self._updates:
            return f"step {self.first_step}/{self.total_steps} | starting, {time.monotonic() - self._started:.0f} s"
        update = self._updates[-1]
        parts = [
            f"step {update['step']}/{self.total_steps}",
            f"loss {decimals(update['loss'])}",
            f"lr {short_number(update['lr'], 3)}",
        ]
        samples, rates = ([update[name] for update in self._updates] for name in ("samples", "images_per_second"))
        images_per_second = metrics.recent_rate(samples, rates)
        parts.append(f"{short_number(images_per_second, 3)} images/s")
        if len(samples) >= metrics.MIN_UPDATES_FOR_RATE:
            parts.append(self._left(images_per_second))
        return " | ".join(parts)

    def _left(self, images_per_second: float) -> str:
        """Return the time left. Validations count apart: those to come take as long as the last did."""
        last = self._updates[-1]
        steps = [(update, earlier) for earlier, update in pairwise(self._updates)]
        samples_per_step = (last["samples"] - self._updates[0]["samples"]) / (last["step"] - self._updates[0]["step"])
        left = (self.total_steps - last["step"]) * samples_per_step / images_per_second
        if not self._validation_steps or last["step"] == self.total_steps:
            return f"{duration(left)} left"
        pauses = [
            update["time"] - earlier["time"] - _seconds(update, earlier)
            for update, earlier in steps
            if earlier["step"] % self._validation_steps == 0
        ]
        to_come = len(due_steps(self._validation_steps, self.total_steps, self.total_steps))
        to_come -= last["step"] // self._validation_steps
        if not pauses:
            return f"{duration(left)} and {counted(to_come, 'validation')} left"
        return f"{duration(left + to_come * max(0.0, pauses[-1]))} left"

    def _read(self) -> None:
        records, restarted = self._metrics.read()
        if restarted:
            self._updates.clear()
        self._updates.extend(record for record in records if record["step"] > self.first_step)

    def _show_measurements(self) -> None:
        """Print a line for every update that was left out, and for every new measurement of the held-out rows."""
        for record in self._left_out.read()[0]:
            self.status.say(f"{record['problem']}; {metrics.LEFT_OUT_FILE} and the log have all")
        records, _ = self._held_out.read()
        for record in records:
            if record["step"] > self._measured:
                self._measured = record["step"]
                earlier = [other for other in held_out.read(self.output_dir) if other["step"] < record["step"]]
                known = [*earlier, record]
                self.status.say(f"step {record['step']}: {held_out.in_words(known)}")

    def _show_scores(self) -> None:
        """Print a line for every new validation with scores."""
        self._scores_at = time.monotonic()
        found = self._finished()
        for folder in [folder for folder, written in found.items() if self._seen.get(folder) != written]:
            with suppress(OSError, ValueError, KeyError, TypeError):  # it is being written anew, or is not ours
                pairs = images.results(folder)
                if fidelity := images.fidelity_of(pairs):
                    self.status.say(f"step {pairs[0].step}: {scores.in_words(fidelity)}")
                self._seen[folder] = found[folder]

    def _finished(self) -> dict[Path, int]:
        """Return the folder of each finished validation -> when it was finished, in nanoseconds."""
        found = {}
        for folder in validation.finished_folders(self.output_dir):
            with suppress(OSError):
                found[folder] = (folder / METADATA).stat().st_mtime_ns
        return found


def _seconds(update: dict[str, Any], earlier: dict[str, Any]) -> float:
    """Return the seconds of an update alone, without what came before it, such as a validation."""
    return float((update["samples"] - earlier["samples"]) / update["images_per_second"])
