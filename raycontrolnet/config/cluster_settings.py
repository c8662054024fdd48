"""The settings of the cluster and the workers. They are declared as in settings.py."""

from __future__ import annotations

from dataclasses import dataclass

from raycontrolnet.config.declare import setting
from raycontrolnet.config.rules import Problems, at_least, problem_of

MACHINES = "decides what the machines do, not what is learned"
"""Reason why all trials of a sweep share a value."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Ray: the cluster and the workers."""

    address: str | None = setting(None, fixed=MACHINES, changes_on_resume=True, left_out_of_card=True)
    """Ray cluster to run on (`auto` for the one on this machine); by default RAY_ADDRESS, or else a local Ray."""
    num_workers: str = setting("1", fixed=MACHINES)
    """Workers (devices) N; MIN:MAX for as many as the cluster has, with the updates of MAX; 0: in this process."""
    use_gpu: bool | None = setting(None, fixed=MACHINES, changes_on_resume=True)
    """Train on GPUs; by default if the cluster has any."""
    cpus_per_worker: float | None = setting(None, fixed=MACHINES, changes_on_resume=True)
    """CPUs a worker reserves, and its threads; by default its share of the machine, less one for loading data."""
    accelerator_type: str | None = setting(None, fixed=MACHINES)
    """GPU type for the workers, such as A100 or H100."""
    max_failures: int = setting(3, fixed=MACHINES, changes_on_resume=True)
    """Number of times a run continues by itself after losing a worker."""
    max_preemption_failures: int = setting(-1, fixed=MACHINES, changes_on_resume=True)
    """The same for machines that are reclaimed, as spot instances; -1 without limit."""
    wait_timeout_s: float | None = setting(None, fixed=MACHINES, changes_on_resume=True)
    """Seconds to wait for workers, as for nodes that an autoscaler starts; by default without end."""
    hang_timeout_s: float = setting(600.0, fixed=MACHINES, changes_on_resume=True)
    """Seconds without progress after which a worker is started again; until its first update 3 times, at least 900."""
    dataloader_num_workers: int = setting(0, fixed=MACHINES)
    """Concurrent loading tasks per worker; 0 for a number that suits the machine."""

    def problems(self) -> Problems:
        yield from at_least(self, 0, "max_failures", "dataloader_num_workers")
        yield from at_least(self, -1, "max_preemption_failures")
        for name in ("cpus_per_worker", "wait_timeout_s", "hang_timeout_s"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                yield problem_of(self, name, "must be above 0")
        try:
            low, high = self.worker_range
        except ValueError:
            yield problem_of(self, "num_workers", "must be a number, or MIN:MAX")
        else:
            if low < 0 or high < low or (low != high and low < 1):
                yield problem_of(self, "num_workers", "must be 0 or more, or MIN:MAX with 1 <= MIN <= MAX")

    @property
    def in_this_process(self) -> bool:
        """True if the run trains in the caller's process, without Ray."""
        return self.worker_range == (0, 0)

    @property
    def worker_range(self) -> tuple[int, int]:
        """Smallest and largest number of workers: equal, unless the run is elastic."""
        low, _, high = str(self.num_workers).partition(":")
        return int(low), int(high or low)

    @property
    def most_workers(self) -> int:
        """Largest number of workers, by which updates are counted; 1 in the caller's process."""
        return max(1, self.worker_range[1])
