"""The lease of a sweep: the one driver that may write its files."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from raycontrolnet.storage.files import replace_text
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training.background import repeating
from raycontrolnet.training.shared_folder import check_store_is_seen, wait_for_driver

logger = logging.getLogger(__name__)

LEASE_FILE = ".sweep_id"
FETCH_INTERVAL_S = 3.0


@dataclass(frozen=True)
class SweepLease:
    """A driver's claim to a sweep: the file that holds its id. Another driver that resumes the sweep replaces it."""

    folder: RunFolder
    """The sweep's folder, as the driver or its trials use it."""
    sweep_id: str

    @property
    def sweep_dir(self) -> Path:
        """The sweep's folder on this machine."""
        return self.folder.path

    def for_trials(self) -> SweepLease:
        """Return the lease for the sweep's trials."""
        return replace(self, folder=self.folder.for_workers())

    def set(self) -> None:
        """Take the sweep over."""
        replace_text(self.sweep_dir / LEASE_FILE, self.sweep_id)  # trials read it all the time
        self.folder.push(LEASE_FILE)

    def remove(self) -> None:
        """Give the sweep up; its trials end when they see that."""
        try:
            self.folder.pull(LEASE_FILE)
            if self.stands():
                self.folder.delete(LEASE_FILE)
        except OSError as error:
            (self.sweep_dir / LEASE_FILE).unlink(missing_ok=True)
            logger.warning("%s stays in %s (%s)", LEASE_FILE, self.folder.shown, error)

    def stands(self) -> bool:
        """Check that the sweep is still this driver's, as far as this machine knows; see `followed`."""
        try:
            return (self.sweep_dir / LEASE_FILE).read_text() == self.sweep_id
        except FileNotFoundError:
            return False
        except OSError:  # storage that fails for a moment
            return True

    def taken_over(self) -> bool:
        """Check that the sweep is another driver's now."""
        return (self.sweep_dir / LEASE_FILE).exists() and not self.stands()

    def followed(self) -> AbstractContextManager[None]:
        """Learn in a thread what becomes of the lease in an object store."""
        if not self.folder.is_stored:
            return nullcontext()
        return repeating(lambda: self.folder.pull(LEASE_FILE), FETCH_INTERVAL_S, "lease")

    def check(self) -> None:
        """Check, in a trial, that the folder is the one that the driver sees.

        Raises:
            UserError: it is another folder of the same name.
        """
        if self.folder.is_stored:
            check_store_is_seen(self.folder, LEASE_FILE, self.sweep_id)
        else:
            wait_for_driver(self.sweep_dir, self.stands, "the sweep's driver")
