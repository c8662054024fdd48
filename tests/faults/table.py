"""The results of faults, and their table.

python tests/faults/table.py faults.jsonl     # prints it, as it stands in tests/benchmarks/RESULTS.md
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from moments import MOMENTS, NOT_THERE, TARGETS

RESULTS_VARIABLE = "FAULTS_RESULTS"
_results: list[Outcome] = []


@dataclass(frozen=True)
class Outcome:
    """A fault, and what came of it."""

    target: str
    moment: str
    draw: int
    detail: str
    """Place in the code."""
    codes: list[int]
    """Exit codes of the commands: of one, if the run went on by itself."""
    recovered_s: float
    """Seconds from the fault to the first update that was not done before it, or to the end."""
    lost: int
    """Updates that were done again."""
    same: bool
    """All bytes that count are those of an undisturbed run."""


def add_result(outcome: Outcome) -> None:
    """Keep a result, in the file of FAULTS_RESULTS too."""
    _results.append(outcome)
    if name := os.environ.get(RESULTS_VARIABLE):
        with Path(name).open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")


def results() -> list[Outcome]:
    """Return all results: of FAULTS_RESULTS, or of this process."""
    name = os.environ.get(RESULTS_VARIABLE)
    return read(Path(name)) if name and Path(name).exists() else list(_results)


def read(file: Path) -> list[Outcome]:
    return [Outcome(**json.loads(line)) for line in file.read_text().splitlines()]


def table(outcomes: list[Outcome]) -> str:
    """Return a row for each target, a column for each moment, as Markdown.

    A cell has the draws' seconds until new work was done and the updates that were done again; a star where the command
    had to be run again, and the number of draws whose results were others than those of an undisturbed run.
    """
    lines = ["| | " + " | ".join(MOMENTS) + " |", "|---|" + "---|" * len(MOMENTS)]
    for target in TARGETS:
        cells = [_cell([each for each in outcomes if (each.target, each.moment) == (target, moment)])
                 if (moment, target) not in NOT_THERE else "none runs" for moment in MOMENTS]  # fmt: skip
        lines.append(f"| {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(outcomes: list[Outcome]) -> str:
    if not outcomes:
        return "not tried"
    shown = []
    for each in sorted(outcomes, key=lambda outcome: outcome.draw):
        again = "*" if len(each.codes) > 1 else ""
        lost = f", {each.lost} lost" if each.lost else ""
        shown.append(f"{each.recovered_s:.0f} s{again}{lost}{'' if each.same else ' **differs**'}")
    return "; ".join(shown)


if __name__ == "__main__":
    print(table(read(Path(sys.argv[1]))))
