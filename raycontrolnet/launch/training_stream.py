"""The stream of a run's batches on Ray, made anew at every start of its workers.

A process of Ray's makes it, which this module keeps light: no torch, which takes 2 s of a CPU to import.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.stream import StreamLayout, ray_dataset
from raycontrolnet.storage.checkpoint import Checkpoint
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training.schedule import Schedule

if TYPE_CHECKING:
    import ray.data

ENDLESS = 2**40


@dataclass(frozen=True)
class TrainingStream:
    """The stream from the last checkpoint on; call it with the number of workers.

    Ray sends it to every worker too, so it holds little: no rows, and no secrets.
    """

    config: TrainConfig
    """As the workers'."""
    folder: RunFolder
    run_id: str
    start: Checkpoint | None
    """Start of the run; after a failure it continues from its own last checkpoint."""
    num_samples: int
    """N, samples per epoch."""
    loader: Any
    """A reference to the `BatchLoader` in Ray's object store."""
    batch_bytes: int

    def __call__(self, num_workers: int) -> ray.data.Dataset:
        """Return the data set of so many workers."""
        fewest, most = self.config.worker_range
        max_tasks = self.config.dataloader_num_workers * most or None
        layout = self.layout(num_workers, self.folder.last(self.run_id) or self.start)
        return ray_dataset(self.loader, layout, max_tasks, elastic=fewest != most)

    def layout(self, num_workers: int, checkpoint: Checkpoint | None) -> StreamLayout:
        """Return the batches from a checkpoint on, for as many workers as there are now.

        Without end for an elastic run, of which the workers may have unequal numbers of batches: they stop by
        themselves.
        """
        step, samples = (checkpoint.step, checkpoint.samples) if checkpoint else (0, 0)
        fewest, most = self.config.worker_range
        schedule = Schedule.of(self.config, self.num_samples, most, checkpoint)
        micro_steps = schedule.batches_per_worker(step) if fewest == most else ENDLESS
        bundle = StreamLayout.bundle_for(self.batch_bytes)
        return StreamLayout(samples, micro_steps, schedule.batch_size, num_workers, bundle)
