"""Who follows a run from outside, such as a sweep, and may end it."""

from __future__ import annotations

from typing import Protocol


class Stopped(BaseException):
    """The run was ended from outside; what it has written stands. Like Ctrl-C, no failure that anybody should mend."""


class Follower(Protocol):
    """Told of a run's progress, in the thread that trains or one beside it; its methods raise `Stopped` to end it."""

    def updated(self) -> None:
        """After every update, or every second."""

    def validated(self) -> None:
        """After every validation but the last: its figures are in the run's folder, and a checkpoint if one was due."""
