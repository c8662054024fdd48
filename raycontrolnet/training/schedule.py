"""The schedule of a run: how many updates, of how many samples each, and when something is due."""

from __future__ import annotations

import math
from dataclasses import dataclass

from raycontrolnet.config.settings import OptimConfig, StepConfig
from raycontrolnet.storage.checkpoint import Checkpoint


@dataclass(frozen=True)
class Schedule:
    """Numbers of updates and samples of a run on `world_size` workers.

    Updates per epoch = ceil(ceil(N / (workers x batch)) / accumulation).
    """

    num_samples: int
    """N, samples per epoch."""
    world_size: int
    batch_size: int
    """Samples per worker and micro-step."""
    accumulation_steps: int
    total_updates: int

    @staticmethod
    def of(step: StepConfig, num_samples: int, world_size: int, start: Checkpoint | None = None) -> Schedule:
        """Return the schedule for N = `num_samples`; `world_size` counts workers (1 in the caller's process).

        Args:
            start: where the run continues. If another number of workers, or batches of another size, consumed its
                samples, the epochs that are left are counted from its samples.
        """
        batch_size, accumulation_steps = step.train_batch_size, step.gradient_accumulation_steps
        micro_steps = math.ceil(num_samples / (world_size * batch_size))
        updates_per_epoch = math.ceil(micro_steps / accumulation_steps)
        samples_per_update = world_size * accumulation_steps * batch_size
        total_updates = step.num_train_epochs * updates_per_epoch
        if start is not None and start.samples != start.step * samples_per_update:
            left = max(0, step.num_train_epochs * num_samples - start.samples)
            total_updates = start.step + math.ceil(left / samples_per_update)
        return Schedule(
            num_samples=num_samples,
            world_size=world_size,
            batch_size=batch_size,
            accumulation_steps=accumulation_steps,
            total_updates=max(step.max_train_steps or total_updates, start.step if start else 0),
        )

    @property
    def samples_per_update(self) -> int:
        return self.world_size * self.accumulation_steps * self.batch_size

    def batches_per_worker(self, step: int) -> int:
        """Return the micro-steps from `step` updates to the end."""
        return max(0, self.total_updates - step) * self.accumulation_steps

    def first_sample(self, samples: int, micro_step: int, rank: int) -> int:
        """Return k of the first sample of worker `rank` at `micro_step`, in a stream that begins at k = `samples`."""
        return samples + (micro_step * self.world_size + rank) * self.batch_size

    def learning_rate(self, optim: OptimConfig) -> float:
        """Return the learning rate after scale_lr."""
        return optim.learning_rate * (self.samples_per_update if optim.scale_lr else 1)

    def is_due(self, every: int, step: int) -> bool:
        """Check whether something is due after update `step`: `every` so many, and after the last."""
        return step % every == 0 or step == self.total_updates


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
