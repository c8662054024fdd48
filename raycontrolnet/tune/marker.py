"""The file by which trials, wherever they run, know that their sweep goes on: it is there, and says which sweep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from raycontrolnet.run.job import wait_for_driver

MARKER = ".sweep_id"


@dataclass(frozen=True)
class Marker:
    sweep_dir: Path
    sweep_id: str

    def set(self) -> None:
        (self.sweep_dir / MARKER).write_text(self.sweep_id)

    def remove(self) -> None:
        """Trials end when they see it."""
        if self.stands():
            (self.sweep_dir / MARKER).unlink(missing_ok=True)

    def stands(self) -> bool:
        try:
            return (self.sweep_dir / MARKER).read_text() == self.sweep_id
        except FileNotFoundError:
            return False
        except OSError:  # storage that fails for a moment
            return True

    def check(self) -> None:
        """In a trial: the folder must be the one that the driver sees.

        Raises:
            UserError: if it is another of the same name.
        """
        wait_for_driver(self.sweep_dir, self.stands, "the sweep's driver")
