"""run.json: the status and the result of a run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raycontrolnet.errors import Interrupted
from raycontrolnet.signals import haste
from raycontrolnet.storage.files import read_json, replace_text
from raycontrolnet.storage.lock import Owner, has_ended
from raycontrolnet.training.run_callback import RunStopped
from raycontrolnet.training.timings import TIMINGS_FILE, read_timings

STATUS_FILE = "run.json"


class RunStatus(dict[str, Any]):
    """Content of run.json: status, steps, samples, seconds by phase, versions."""

    def __init__(self, output_dir: Path, started: float, versions: dict[str, str]):
        super().__init__(status="running", started=started, versions=versions, process=Owner().process())
        self._path, self._started = output_dir / STATUS_FILE, started
        self._writing = threading.Lock()

    def write(self) -> None:
        """Replace run.json."""
        content = {**self, "seconds": round(time.time() - self._started, 3)}
        with self._writing:  # a thread writes it as well, see `Haste.at_its_end`
            replace_text(self._path, json.dumps(content, indent=1) + "\n")

    def interrupted(self) -> None:
        """Write that the run was interrupted, if it is running still."""
        if self["status"] == "running":
            self["status"] = "interrupted"
            self.write()


def read_status(output_dir: Path) -> dict[str, Any]:
    """Return run.json; empty if there is none. A run whose process has vanished is `interrupted`."""
    status = read_json(output_dir / STATUS_FILE)
    process = status.get("process")
    if status.get("status") == "running" and isinstance(process, dict) and has_ended(output_dir, process):
        status |= {
            "status": "interrupted",
            "cause": f"Process {process.get('pid')} on {process.get('host')} was killed.",
        }
    return status


@contextmanager
def live_status(output_dir: Path, started: float, versions: dict[str, str]) -> Iterator[RunStatus]:
    """Write run.json at the start and, however the run ends, at the end."""
    status = RunStatus(output_dir, started, versions)
    (output_dir / TIMINGS_FILE).unlink(missing_ok=True)  # of a driver that was killed
    status.write()
    try:
        with haste().at_its_end(status.interrupted):
            yield status
    except BaseException as error:
        if status["status"] == "running":
            interrupted = isinstance(error, (Interrupted, KeyboardInterrupt))
            status["status"] = (
                "interrupted" if interrupted else "stopped" if isinstance(error, RunStopped) else "failed"
            )
            if str(error):
                status["cause"] = str(error)
        raise
    finally:
        if "timings" not in status:  # the run ended early
            status |= {"timings": {}, **read_timings(output_dir)}
        status.write()
        (output_dir / TIMINGS_FILE).unlink(missing_ok=True)
