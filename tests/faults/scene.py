"""A command that is disturbed: it runs to a planned moment, a fault comes, and it is run again until it ends well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from moments import Plan
from processes import kill_all, processes_of_session

PAUSES = Path(__file__).with_name("pauses")
MOMENT_TIMEOUT_S, END_TIMEOUT_S = 300.0, 400.0
GRACE_S = 0.5
"""From the fault to the end of the pause: the processes that are left see it first."""
MOST_TRIES = 3


@dataclass
class Scene:
    """One command, and the file by which its processes and this one tell each other of the moment."""

    folder: Path
    """FAULTS_FOLDER of all processes."""
    command: list[str]
    again: list[str]
    """The remedy: what the user runs if the command does not end well."""
    environment: Mapping[str, str]
    codes: list[int] = field(default_factory=list)
    """Exit codes of the tries."""
    disturbed_at: float = 0.0
    """Unix seconds of the fault."""

    def play(self, plan: Plan, fault: Callable[[subprocess.Popen[bytes], int], None]) -> float:
        """Run the command with the fault, which is given the driver and the id of the process that pauses.

        Returns:
            Unix seconds of the end.
        """
        for file in self.folder.iterdir():
            file.unlink()
        (self.folder / "plan.json").write_text(json.dumps(asdict(plan)))
        drivers = [self._start(self.command)]
        try:
            process = self._at_the_moment(drivers[0])
            self.disturbed_at = time.time()
            fault(drivers[0], process)
            time.sleep(GRACE_S)
            (self.folder / "go").touch()
            self._end(drivers[0])
            (self.folder / "plan.json").unlink()
            while self.codes[-1] != 0 and len(self.codes) < MOST_TRIES:
                drivers.append(self._start(self.again))
                self._end(drivers[-1])
            return time.time()
        finally:
            for driver in drivers:
                kill_all(processes_of_session(driver.pid))
                driver.wait()

    def said(self) -> str:
        """Return what the tries wrote to the terminal."""
        return (self.folder.parent / "said.txt").read_text()

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, [str(PAUSES), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "FAULTS_FOLDER": str(self.folder), **self.environment}
        said = (self.folder.parent / "said.txt").open("wb" if command is self.command else "ab")
        with said:
            return subprocess.Popen(
                [sys.executable, "-m", "raycontrolnet", *command],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, start_new_session=True,
            )  # fmt: skip

    def _at_the_moment(self, driver: subprocess.Popen[bytes]) -> int:
        """Wait for a process to pause; return its id."""
        end, here = time.monotonic() + MOMENT_TIMEOUT_S, self.folder / "here"
        while not here.exists():
            assert driver.poll() is None, f"the command ended before the moment: {self.said()}"
            assert time.monotonic() < end, f"the moment has not come: {self.said()}"
            time.sleep(0.02)
        return int(here.read_text())

    def _end(self, driver: subprocess.Popen[bytes]) -> None:
        try:
            self.codes.append(driver.wait(END_TIMEOUT_S))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the command does not end: {self.said()}") from None
