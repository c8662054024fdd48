"""The contract of what follows a run from outside, and may end it."""

from __future__ import annotations

from typing import Protocol


class RunStopped(BaseException):
    """The run was ended from outside, which is no failure; what it has written stands."""


class RunCallback(Protocol):
    """Receiver of a run's progress, in the training thread or one beside it; raises `RunStopped` to end the run."""

    def updated(self) -> None:
        """Do what is due after every update, or every second."""

    def validated(self, step: int) -> None:
        """Do what is due after the validation of `step`, but the last; its figures and a checkpoint are written."""
