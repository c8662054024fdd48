"""Signs of life that the workers of a run leave for each other, so that a hang names the worker that others wait for.

They stand in the key-value store by which torch's process group met, so that they need no disk or port of their own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch.distributed as dist

from raycontrolnet.text import duration
from raycontrolnet.training.background import repeating

KEY = "raycontrolnet/worker-{}"
PATIENCE_S = 2.0
"""Time to wait at the end for a store that may answer no more."""


class Sign(NamedTuple):
    """A message of a worker about itself."""

    looks: int
    """Grows while the worker's process runs."""
    update: int
    """The update that it is in."""
    doing: str


class SignsOfLife:
    """Leaves this worker's sign, and keeps the newest of the others with the time since when it has not changed.

    Args:
        rank: this worker's.
        world_size: of the run.
        store: of the process group; `torch.distributed.Store`.
    """

    def __init__(self, rank: int, world_size: int, store: Any):
        self.rank, self.store = rank, store
        self.others = [other for other in range(world_size) if other != rank]
        self.seen: dict[int, tuple[Sign | None, float]] = {}
        """Others' last sign, None before the first, and since when it is that."""
        self.looks = 0
        self.asked: float | None = None
        """Time of the question that the store has not answered yet; None if there is none."""
        self.is_over = False
        """True once the store is no longer there."""

    @classmethod
    def of_process_group(cls) -> SignsOfLife | None:
        """Return those of this process's group; None if it has none."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        # Private: there is no public way to the store, which every process group has.
        store = dist.distributed_c10d._get_default_store()
        # A connection of its own, if torch has that: the group's waits while a communicator is made.
        return cls(dist.get_rank(), dist.get_world_size(), store.clone() if hasattr(store, "clone") else store)

    def exchanging(self, own: Callable[[], tuple[int, str]], interval_s: float) -> AbstractContextManager[None]:
        """Exchange signs every `interval_s` while the `with` block runs, in a thread that may wait for the store.

        Args:
            own: returns the update that this worker is in, and what it is doing.
        """
        return repeating(lambda: self.exchange(*own()), interval_s, "signs of life", patience_s=PATIENCE_S)

    def exchange(self, update: int, doing: str) -> None:
        """Leave this worker's sign, and read the others'."""
        if self.is_over:
            return
        self.looks, self.asked = self.looks + 1, time.monotonic()
        for other in self.others:
            self.seen.setdefault(other, (None, self.asked))
        try:
            self.store.set(KEY.format(self.rank), json.dumps(Sign(self.looks, update, doing)))
            for other in self.others:
                if self.store.check([KEY.format(other)]):
                    sign = Sign(*json.loads(self.store.get(KEY.format(other))))
                    before, _ = self.seen[other]
                    if before is None or before.looks != sign.looks:
                        self.seen[other] = sign, time.monotonic()
        except RuntimeError:  # its worker has ended; torch prints a stack for every try
            self.is_over = True
        self.asked = None

    def suspect(self, update: int, doing: str, silent_s: float) -> str | None:
        """Say which worker this one waits for; None if no sign tells.

        Args:
            update: that this worker is in.
            doing: what this worker does.
            silent_s: seconds without a sign after which a worker is not running.
        """
        if self.is_over:
            return "worker 0, which keeps all signs of life, has ended"
        now = time.monotonic()
        if self.asked is not None and now - self.asked > silent_s:
            return (
                f"worker 0, which keeps all workers' signs of life, has not answered for {duration(now - self.asked)}"
            )
        silent = {other: now - since for other, (_, since) in self.seen.items() if now - since > silent_s}
        if silent:
            other = max(silent, key=lambda each: silent[each])
            return f"worker {other} has given no sign of life for {duration(silent[other])}"
        signs = sorted((sign.update, other, sign.doing) for other, (sign, _) in self.seen.items() if sign)
        for number, other, at in signs:
            if number < update or (number == update and at != doing):
                return f"this one is in update {update} at {doing}, worker {other} in update {number} at {at}"
        return None
