"""The data of Ray Train's workers, made once their number is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ray.train import DataConfig

if TYPE_CHECKING:
    import ray.data


def nothing_yet() -> None:
    """Stand for a data set in `TorchTrainer(datasets=...)`, which asks for it before it has counted the workers."""


class DataOfWorkers(DataConfig):
    """Ray Train's splitting of a data set that depends on the number of workers, as an elastic run's does."""

    def __init__(self, make: Callable[[int], ray.data.Dataset], options: ray.data.ExecutionOptions):
        """Let `make` give the data set for a number of workers, at every start of these.

        Args:
            make: runs on the driver's machine, in a process of Ray's.
            options: to run it with.
        """
        super().__init__(execution_options=options, enable_shard_locality=False)
        self._make = make

    def configure(self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """Return the shards of each worker, by the data sets' names."""
        made = {name: self._make(world_size) for name in datasets}
        shards: list[dict[str, Any]] = super().configure(made, world_size, *args, **kwargs)
        return shards
