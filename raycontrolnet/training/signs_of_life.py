"""Signs of life that the workers of a run leave for each other, so that a hang names the worker that others wait for.

They stand in the key-value store by which torch's process group met, so that they need no disk or port of their own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch.distributed as dist

from raycontrolnet.text import counted, duration, first_of
from raycontrolnet.training.background import repeating

KEY = "raycontrolnet/worker-{}"
MOST_NAMED = 3
"""Workers that are named, of those at one place."""
PATIENCE_S = 2.0
"""Time to wait at the end for a store that may answer no more."""


class Position(NamedTuple):
    """A worker's position in its run."""

    update: int
    """The update that it is in."""
    doing: str
    left: int = 0
    """Micro-steps of the update that it has not finished."""
    where: str = ""
    """Place in the code, as `whereabouts` says it; empty if nobody has looked."""

    def __str__(self) -> str:
        left = f" with {counted(self.left, 'micro-step')} to go" if self.left else ""
        return f"in update {self.update} at {self.doing}{left}"


class Sign(NamedTuple):
    """A message of a worker about itself."""

    looks: int
    """Grows while the worker's process runs."""
    position: Position


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

    def exchanging(self, own: Callable[[], Position], interval_s: float) -> AbstractContextManager[None]:
        """Exchange signs every `interval_s` while the `with` block runs, in a thread that may wait for the store.

        Args:
            own: returns this worker's position.
        """
        return repeating(lambda: self.exchange(own()), interval_s, "signs of life", patience_s=PATIENCE_S)

    def exchange(self, position: Position) -> None:
        """Leave this worker's sign, and read the others'."""
        if self.is_over:
            return
        self.looks, self.asked = self.looks + 1, time.monotonic()
        for other in self.others:
            self.seen.setdefault(other, (None, self.asked))
        try:
            self.store.set(KEY.format(self.rank), json.dumps(Sign(self.looks, position)))
            for other in self.others:
                if self.store.check([KEY.format(other)]):
                    looks, found = json.loads(self.store.get(KEY.format(other)))
                    sign = Sign(looks, Position(*found))
                    before, _ = self.seen[other]
                    if before is None or before.looks != sign.looks:
                        self.seen[other] = sign, time.monotonic()
        except RuntimeError:  # its worker has ended; torch prints a stack for every try
            self.is_over = True
        self.asked = None

    def suspect(self, position: Position, silent_s: float) -> str | None:
        """Say which worker this one waits for, or else where all are; None if no sign tells.

        Args:
            position: of this worker.
            silent_s: seconds without a sign after which a worker is not running.
        """
        if self.is_over:
            before = self._compared(position)
            ended = "worker 0, which keeps all signs of life, has ended"
            return f"{ended}; before that, {before}" if before else ended
        now = time.monotonic()
        if self.asked is not None and now - self.asked > silent_s:
            return (
                f"worker 0, which keeps all workers' signs of life, has not answered for {duration(now - self.asked)}"
            )
        silent = {other: now - since for other, (_, since) in self.seen.items() if now - since > silent_s}
        if silent:
            other = max(silent, key=lambda each: silent[each])
            return f"worker {other} has given no sign of life for {duration(silent[other])}"
        return self._compared(position)

    def _compared(self, position: Position) -> str | None:
        """Say which worker is behind this one, or else where all are; None if no sign tells."""
        positions = {other: sign.position for other, (sign, _) in self.seen.items() if sign}
        for other, at in sorted(positions.items(), key=lambda each: (each[1].update, -each[1].left, each[0])):
            if _is_behind(at, position):
                return f"this one is {position}, worker {other} {at}"
        return _all_alike(position, positions) if len(positions) == len(self.others) else None


def _is_behind(one: Position, other: Position) -> bool:
    """Check whether `one` has more to do, or is in the same update and at something else."""
    if (one.update, -one.left) != (other.update, -other.left):
        return (one.update, -one.left) < (other.update, -other.left)
    return one.doing != other.doing


def _all_alike(position: Position, others: Mapping[int, Position]) -> str | None:
    """Say where in the code the workers are, if none is behind another, the fewest at first; None if nobody knows."""
    if not position.where or any(other[:3] != position[:3] for other in others.values()):
        return None
    who = {position.where: ["this one"]}
    for other, at in sorted(others.items()):
        who.setdefault(at.where or "somewhere", []).append(f"worker {other}")
    if len(who) == 1:
        return f"all workers are {position}, {position.where}"
    told = [
        f"{first_of(names, MOST_NAMED)} {where}" for where, names in sorted(who.items(), key=lambda each: len(each[1]))
    ]
    return f"all workers are {position}: {'; '.join(told)}"
