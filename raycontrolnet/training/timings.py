"""The seconds that a run took so far, by phase, as its worker leaves them for the driver."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from raycontrolnet.storage.files import replace_text

TIMINGS_FILE = ".timings.json"


def write_timings(output_dir: Path, timings: Mapping[str, float], processes: int) -> None:
    """Write the seconds by phase so far and the number of processes that train: for the report, or a failed run."""
    replace_text(output_dir / TIMINGS_FILE, json.dumps({"processes": processes, "timings": timings}))


def read_timings(output_dir: Path) -> dict[str, Any]:
    """Return what `write_timings` wrote last, under run.json's names; empty if there is nothing."""
    with suppress(FileNotFoundError):
        return dict(json.loads((output_dir / TIMINGS_FILE).read_text()))
    return {}
