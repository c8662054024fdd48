"""Speed and result of the demo: a run for each seed, evaluated at its checkpoints.

    python tests/benchmarks/demo_fidelity.py              # three seeds, about a quarter of an hour

Prints the seconds of each run from command to result, and the control fidelity over 100 unseen outlines by updates.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from raycontrolnet.demo.demo import BASE, FOLDER, UNSEEN, UNTRAINED, demo_settings
from raycontrolnet.demo.evaluation import Evaluation, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    measured: dict[int, dict[int, Evaluation]] = {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory(prefix="raycontrolnet-demo-") as folder:
            os.chdir(folder)
            started = time.monotonic()
            command = [sys.executable, "-m", "raycontrolnet", "demo", "--seed", str(seed)]
            command += ["--checkpointing_steps", "100"]
            subprocess.run(command, check=True, capture_output=True, env=os.environ | {"XDG_CACHE_HOME": folder})
            print(f"# seed {seed}: {time.monotonic() - started:.0f} s", flush=True)
            measured[seed] = by_step(Path(demo_settings["output_dir"]))
            os.chdir("/")
    print("| updates | control fidelity | both colours right |\n|---|---|---|")
    for step in measured[args.seeds[0]]:
        found = [measured[seed][step] for seed in args.seeds]
        fidelities = ", ".join(f"{one.fidelity.mean:.3f}" for one in found)
        print(f"| {step} | {fidelities} | {', '.join(f'{one.right_colours:.0%}' for one in found)} |")


def by_step(run: Path) -> dict[int, Evaluation]:
    """Evaluate the untrained ControlNet and every checkpoint of a run in the current folder."""
    checkpoints = {int(path.name.removeprefix("checkpoint-")): path for path in run.glob("checkpoint-*")}
    controlnets = {0: UNTRAINED} | dict(sorted(checkpoints.items()))
    drawn, scale = FOLDER / "measured", demo_settings["guidance_scale"]
    return {
        step: evaluate(path, BASE, UNSEEN, drawn / str(step), guidance_scale=scale)
        for step, path in controlnets.items()
    }


if __name__ == "__main__":
    main()
