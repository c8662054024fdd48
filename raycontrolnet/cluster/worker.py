"""Ray Train inside a worker, where its interface is alpha, and the records that it leaves in a run's folder.

Each name here stands in tests/test_ray_hooks.py, which fails when a new Ray has renamed it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RECLAIM_INTERVAL_S = 20.0
"""Seconds of work, about, that the loss of a machine may cost: its notice comes up to two minutes before."""
LOOK_INTERVAL_S = 2.0
"""Seconds between two looks where each is a question to the cluster's head."""
RECORDS_OF_RAY = (".validate_storage_marker", "checkpoint_manager_snapshot.json")
"""Undocumented files of Ray Train in a run's folder; Tune leaves the first beside its trials. If the second stays, Ray
continues the next run there from it, with checkpoints that may be gone."""


def remove_ray_records(output_dir: Path) -> None:
    """Remove Ray's own records from a run's or a sweep's folder: the checkpoints on disk are the only truth."""
    for name in RECORDS_OF_RAY:
        (output_dir / name).unlink(missing_ok=True)


def place_among_workers() -> tuple[int, int]:
    """Return this worker's rank, and how many workers there are."""
    import ray.train

    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size()


def gpu_share() -> float:
    """Return the part of a GPU that Ray has given to this process, if it shares one; else 1."""
    if sys.modules.get("ray") is None:  # no worker of Ray's; it may not even be installed
        return 1.0
    import ray

    if not ray.is_initialized():
        return 1.0
    try:
        share = float(ray.get_runtime_context().get_assigned_resources().get("GPU", 1.0))
    except AssertionError:  # a driver
        return 1.0
    return share if 0 < share < 1 else 1.0


def nodes_to_be_reclaimed() -> int:
    """Return the number of the workers' nodes that are about to be taken away, as spot instances are.

    Private: the public `ray.train.get_preemption_info` is a barrier, which every update would wait for. Without this a
    reclaimed node costs the updates since the last checkpoint.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    info = get_train_context().preemption_context.preemption_info
    return len(info.preempted_node_to_ranks) if info else 0


def this_node_is_to_be_reclaimed() -> int:
    """Return 1 if the machine of this process, a trial say, is about to be taken away, else 0.

    Private: no public name tells a process that Ray Train did not start. Without this a reclaimed trial loses the
    updates since its last checkpoint.
    """
    import ray
    from ray._private import state
    from ray.exceptions import RaySystemError

    if not ray.is_initialized():
        return 0
    try:
        return int(ray.get_runtime_context().get_node_id() in state.state.get_draining_nodes())
    except (RaySystemError, RuntimeError):  # a Ray Client, or a Ray that ends just now; the notice is no must
        return 0


class ReclaimNotices:
    """Notices that machines of the workers are about to be taken away."""

    def __init__(self, *, local: bool = False, clock: Callable[[], float] = time.monotonic):
        """Begin to look for notices.

        Args:
            local: for the machine of this process, which is no worker of Ray Train.
            clock: seconds.
        """
        self._look, self._look_interval_s = nodes_to_be_reclaimed, 0.0
        if local:  # asks the cluster's head
            self._look, self._look_interval_s = this_node_is_to_be_reclaimed, LOOK_INTERVAL_S
        self._clock, self._known, self._asked_at, self._looked_at = clock, 0, 0.0, -LOOK_INTERVAL_S

    def ask_for_checkpoint(self) -> bool:
        """Check whether to write a checkpoint now: at a notice, and now and then until the machine is gone."""
        now, going = self._clock(), self._known
        if now - self._looked_at >= self._look_interval_s:
            self._looked_at, going = now, self._look()
        asks = going > self._known or (going > 0 and now - self._asked_at > RECLAIM_INTERVAL_S)
        self._known = going
        if asks:
            self._asked_at = now
        return asks


def report_checkpoint(
    figures: Mapping[str, Any], name: str, place: str | None, written: Callable[[], object] = lambda: None
) -> None:
    """Report `figures` and the checkpoint `name` to Ray Train, once it is written; all workers must call it.

    Args:
        figures: metrics, by name.
        name: of the checkpoint's folder.
        place: its path or URI, on rank 0; None on the others.
        written: returns once it is there; called in a thread of Ray's, which reports one after the other.
    """
    import ray.train

    def wait_for_it(checkpoint: ray.train.Checkpoint, checkpoint_dir_name: str) -> ray.train.Checkpoint:
        written()
        return checkpoint

    ray.train.report(
        dict(figures),
        checkpoint=None if place is None else ray.train.Checkpoint(place),
        checkpoint_dir_name=name,
        # Alpha. Without it Ray would copy the checkpoint, which is in its place already, onto itself.
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=wait_for_it,
        delete_local_checkpoint_after_upload=False,
    )


def from_rank_zero(value: Any) -> Any:
    """Return rank 0's `value` on every worker; all must call it.

    `ray.train.collective` is alpha. Unlike the process group, it has no timeout that a slow worker exceeds.
    """
    import ray.train.collective

    return ray.train.collective.broadcast_from_rank_zero(value)


def wait_for_all() -> None:
    """Wait until all workers have called this; alpha, as `from_rank_zero`."""
    import ray.train.collective

    ray.train.collective.barrier()
