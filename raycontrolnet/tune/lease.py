"""The lease of a sweep: the one driver that may write its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raycontrolnet.storage.files import replacing
from raycontrolnet.training.job import wait_for_driver

LEASE_FILE = ".sweep_id"


@dataclass(frozen=True)
class SweepLease:
    """A driver's claim to a sweep: the file that holds its id. Another driver that resumes the sweep replaces it."""

    sweep_dir: Path
    sweep_id: str

    def set(self) -> None:
        """Take the sweep over."""
        with replacing(self.sweep_dir / LEASE_FILE) as partial:  # trials read it all the time
            partial.write_text(self.sweep_id)

    def remove(self) -> None:
        """Give the sweep up; its trials end when they see that."""
        if self.stands():
            (self.sweep_dir / LEASE_FILE).unlink(missing_ok=True)

    def stands(self) -> bool:
        """Check that the sweep is still this driver's."""
        try:
            return (self.sweep_dir / LEASE_FILE).read_text() == self.sweep_id
        except FileNotFoundError:
            return False
        except OSError:  # storage that fails for a moment
            return True

    def taken_over(self) -> bool:
        """Check that the sweep is another driver's now."""
        return (self.sweep_dir / LEASE_FILE).exists() and not self.stands()

    def check(self) -> None:
        """Check, in a trial, that the folder is the one that the driver sees.

        Raises:
            UserError: it is another folder of the same name.
        """
        wait_for_driver(self.sweep_dir, self.stands, "the sweep's driver")
