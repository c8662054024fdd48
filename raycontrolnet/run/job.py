"""The job: what the driver hands to the workers, and what they hand back when it is hopeless."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raycontrolnet.config import TrainConfig
from raycontrolnet.data.stream import BatchLoader
from raycontrolnet.errors import RunError, UserError
from raycontrolnet.run import checkpoint as checkpoints
from raycontrolnet.run.checkpoint import Checkpoint
from raycontrolnet.run.validation import ValidationItem

FAILURE = ".failure.json"
LOG = "run.log"


@dataclass(frozen=True)
class Job:
    """What the driver hands to every worker: plain data, without secrets but for the token, which repr leaves out."""

    config: TrainConfig
    """With absolute paths, a seed, and no hub_token."""
    run_id: str
    num_samples: int
    """N, samples per epoch."""
    start: Checkpoint | None
    """Where the run begins; after a failure it continues from its own last checkpoint."""
    use_gpu: bool
    threads: int | None
    """CPU threads of a worker; None leaves them."""
    trackers: tuple[str, ...]
    tracker_settings: Mapping[str, Any]
    validation_items: tuple[ValidationItem, ...]
    facts: Mapping[str, Any]
    """For the checkpoints' manifests."""
    token: str | None = field(default=None, repr=False)
    submitted: float = field(default_factory=time.time)
    """Unix seconds."""
    loader: BatchLoader | None = None
    """Only for a run in the caller's process: there is no Ray Data then."""

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    def current_checkpoint(self) -> Checkpoint | None:
        """Where to continue: this run's last complete checkpoint, or its start."""
        return checkpoints.latest(self.output_dir, self.run_id) or self.start


def record_failure(output_dir: Path, error: UserError | RunError) -> None:
    """Leave a note of a failure that would come again, for the driver and for Ray's next try; the first one stands."""
    record = {"kind": "user" if isinstance(error, UserError) else "run", "message": str(error)}
    try:
        with (output_dir / FAILURE).open("x") as file:
            json.dump(record, file)
    except FileExistsError:
        pass


def read_failure(output_dir: Path) -> UserError | RunError | None:
    """The failure a worker recorded, if any."""
    try:
        record = json.loads((output_dir / FAILURE).read_text())
    except FileNotFoundError:
        return None
    return (UserError if record["kind"] == "user" else RunError)(record["message"])


def forget_failure(output_dir: Path) -> None:
    (output_dir / FAILURE).unlink(missing_ok=True)
