"""run.json: what became of a run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raycontrolnet.errors import Interrupted
from raycontrolnet.run.job import TIMINGS, read_timings

STATUS = "run.json"


@contextmanager
def status_kept(output_dir: Path, started: float, versions: dict[str, str]) -> Iterator[dict[str, Any]]:
    """run.json: status, steps, samples, seconds by phase, versions; rewritten at the start and at the end."""
    status: dict[str, Any] = {
        "status": "running",
        "started": started,
        "versions": versions,
    }

    def write() -> None:
        partial = output_dir / f".{STATUS}.partial"
        partial.write_text(json.dumps(status | {"seconds": round(time.time() - started, 3)}, indent=1) + "\n")
        os.replace(partial, output_dir / STATUS)

    (output_dir / TIMINGS).unlink(missing_ok=True)  # of a driver that was killed
    write()
    try:
        yield status
    except BaseException as error:
        if status["status"] == "running":
            status["status"] = "interrupted" if isinstance(error, Interrupted) else "failed"
            status["cause"] = str(error)
        raise
    finally:
        if "timings" not in status:  # of a run that did not come to its end
            status["timings"] = read_timings(output_dir)
        write()
        (output_dir / TIMINGS).unlink(missing_ok=True)
