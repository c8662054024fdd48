"""The schedule of a run: how many updates, of how many samples each, who does which, and when something is due."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raycontrolnet.config.settings import OptimConfig, StepConfig
from raycontrolnet.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class Schedule:
    """Numbers of updates and samples of a run. Those of an elastic run are of the most workers that it may have.

    Updates per epoch = ceil(ceil(N / (workers x batch)) / accumulation).
    """

    num_samples: int
    """N, samples per epoch."""
    num_workers: int
    batch_size: int
    """Samples of a micro-batch."""
    accumulation_steps: int
    total_updates: int

    @staticmethod
    def of(step: StepConfig, num_samples: int, num_workers: int, start: Checkpoint | None = None) -> Schedule:
        """Return the schedule for N = `num_samples`.

        Args:
            num_workers: the most workers of an elastic run; 1 in the caller's process.
            start: where the run continues. If updates of another size consumed its samples, the epochs that are left
                are counted from its samples.
        """
        batch_size, accumulation_steps = step.train_batch_size, step.gradient_accumulation_steps
        micro_steps = math.ceil(num_samples / (num_workers * batch_size))
        updates_per_epoch = math.ceil(micro_steps / accumulation_steps)
        samples_per_update = num_workers * accumulation_steps * batch_size
        total_updates = step.num_train_epochs * updates_per_epoch
        if start is not None and start.samples != start.step * samples_per_update:
            left = max(0, step.num_train_epochs * num_samples - start.samples)
            total_updates = start.step + math.ceil(left / samples_per_update)
        return Schedule(
            num_samples=num_samples,
            num_workers=num_workers,
            batch_size=batch_size,
            accumulation_steps=accumulation_steps,
            total_updates=max(step.max_train_steps or total_updates, start.step if start else 0),
        )

    @property
    def samples_per_update(self) -> int:
        return self.micro_batches * self.batch_size

    @property
    def uses_of_a_sample(self) -> float:
        """Mean number of times that the run uses each sample."""
        return self.total_updates * self.samples_per_update / max(1, self.num_samples)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an update, of all workers."""
        return self.num_workers * self.accumulation_steps

    def batches_per_worker(self, step: int) -> int:
        """Return the micro-steps of each of `num_workers` from `step` updates to the end."""
        return max(0, self.total_updates - step) * self.accumulation_steps

    def learning_rate(self, optim: OptimConfig) -> float:
        """Return the learning rate after scale_lr."""
        return optim.learning_rate * (self.samples_per_update if optim.scale_lr else 1)

    def is_due(self, every: int, step: int) -> bool:
        """Check whether something is due after update `step`: `every` so many, and after the last."""
        return step % every == 0 or step == self.total_updates


@dataclass(frozen=True)
class Share:
    """One worker's share: the micro-batches of all updates are dealt round robin to the workers there are.

    However many there are, an update is of the same micro-batches, each with the same weight: DDP's average over
    workers of (`weight` x each worker's mean over its micro-batches) is the mean over all of them.
    """

    rank: int
    world_size: int
    micro_batches: int
    """Micro-batches of an update, of all workers."""

    def place(self, micro_step: int) -> int:
        """Return the place in the stream of this worker's micro-batch `micro_step`."""
        return micro_step * self.world_size + self.rank

    def micro_steps(self, update: int) -> int:
        """Return the number of this worker's micro-batches in `update`, counted from the stream's beginning."""
        return self._before(update + 1) - self._before(update)

    def weight(self, update: int) -> float:
        """Return the weight of this worker's mean; 1 if all workers have as many micro-batches."""
        return self.micro_steps(update) * self.world_size / self.micro_batches

    def _before(self, update: int) -> int:
        return math.ceil((update * self.micro_batches - self.rank) / self.world_size)


def due_steps(every: int, until: int, total_updates: int | None) -> list[int]:
    """Return the updates up to `until` after which something is due; `total_updates` is None if it is not known."""
    due = list(range(every, until + 1, every))
    return [*due, until] if until % every and until == total_updates else due


def warmup_warning(optim: OptimConfig, total_updates: int) -> str | None:
    """Return a warning if the warm-up takes the whole run."""
    if optim.lr_scheduler == "constant" or optim.lr_warmup_steps < total_updates:
        return None
    return (
        f"with --lr_scheduler={optim.lr_scheduler} the learning rate rises for --lr_warmup_steps="
        f"{optim.lr_warmup_steps} updates, and there are {total_updates}: it never comes to --learning_rate"
    )
