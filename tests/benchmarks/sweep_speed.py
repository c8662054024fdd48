"""Cost of a sweep against as many separate runs of the reference loop: same model, data and number of updates.

    python tests/benchmarks/sweep_speed.py all          # 16 trials without early stopping, with ASHA, and the reference
    python tests/benchmarks/sweep_speed.py overhead     # Tune's and Ray's part of the time of trials of five minutes

The model and the images are those of train_speed.py. A sweep's time includes start-up, the latent cache and the
measurements on held-out rows; the reference loop has neither of the last two. Only `--references` runs of the reference
are timed, because all are alike. Machine time is from the command to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from train_speed import raycontrolnet, timed, write_inputs

THREADS = 2
BATCH_SIZE = 4
IMAGES = 192
HELD_OUT = 2
"""Rows: measuring them four times in a trial of 16 updates takes a larger share of it than 16 rows do in one of 400."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["all", "overhead"])
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--updates", type=int, default=40, help="of a trial")
    parser.add_argument("--references", type=int, default=4)
    args = parser.parse_args()
    print(f"# {os.cpu_count()} CPUs", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="raycontrolnet-sweep-") as temporary:
        folder = Path(temporary)
        write_inputs(folder, IMAGES)
        if args.what == "all":
            against_reference(folder, args.trials, args.updates, args.references)
        else:
            overhead(folder, args.trials, args.updates)


def against_reference(folder: Path, trials: int, updates: int, references: int) -> None:
    loop = [sys.executable, str(Path(__file__).with_name("reference_loop.py")), "--base", str(folder / "base")]
    loop += ["--controlnet", str(folder / "controlnet"), "--data", str(folder / "data"), "--steps", str(updates)]
    single = [seconds_of(loop, folder) for _ in range(references)]
    whole = trials * statistics.median(single)
    print(f"| {trials} trials of {updates} updates | machine seconds | ratio |\n|---|---|---|")
    print(
        f"| reference loop, {trials} x the median of {references} runs ({listed(single)}) | {whole:.0f} | |", flush=True
    )
    for name, flags, goal in (
        ("without early stopping", ["--scheduler", "none", "--validation_steps", str(updates)], 1.35),
        ("ASHA, reduction 4, a rung at a quarter", ["--scheduler", "asha", "--reduction_factor", "4"], 2.5),
    ):
        output = folder / f"sweep-{goal}"
        seconds = seconds_of(sweep_command(folder, output, trials, updates, flags), folder)
        print(f"| sweep, {name} | {seconds:.0f} | {whole / seconds:.2f} (goal: {goal}) |", flush=True)
        print(f"# {summary(output)}", file=sys.stderr, flush=True)


def overhead(folder: Path, trials: int, updates: int) -> None:
    """Measure the time besides the updates, as a share of the trial slots' time."""
    output = folder / "sweep"
    seconds = seconds_of(sweep_command(folder, output, trials, updates, ["--scheduler", "none"]), folder)
    sweep = json.loads((output / "sweep.json").read_text())
    steps = sum(json.loads(file.read_text())["timings"]["step_s"] for file in output.glob("trials/*/run.json"))
    trial_s = sweep["machine_seconds"] / trials
    print(f"| {trials} trials of {updates} updates, {sweep['concurrency']} at a time | |\n|---|---|")
    print(f"| from the command to its end | {seconds:.0f} s |\n| a trial | {trial_s:.0f} s |")
    print(f"| of its time besides the steps | {1 - steps / sweep['machine_seconds']:.1%} |")
    print(f"| of the slots' time besides the steps (start and cache too) | "
          f"{1 - steps / (seconds * sweep['concurrency']):.1%} |")  # fmt: skip
    print(f"# {summary(output)}", file=sys.stderr, flush=True)


def sweep_command(folder: Path, output: Path, trials: int, updates: int, flags: list[str]) -> list[str]:
    space = folder / "space.yaml"
    space.write_text("learning_rate: {loguniform: [1.0e-6, 1.0e-4]}\nproportion_empty_prompts: {uniform: [0, 0.5]}\n")
    own = ["--space", str(space), "--num_samples", str(trials), "--validation_split", str(HELD_OUT)]
    own += ["--controlnet_model_name_or_path", str(folder / "controlnet"), "--train_batch_size", str(BATCH_SIZE)]
    own += ["--max_train_steps", str(updates)]
    if "--validation_steps" not in flags:
        own += ["--validation_steps", str(max(1, updates // 4))]
    own += ["--output_dir", str(output), "--report_to", "none", "--seed", "0"]
    own += ["--latents_cache_dir", str(output.with_suffix(".latents"))]
    return raycontrolnet("tune", folder, own + flags)


def seconds_of(command: list[str], folder: Path) -> float:
    start, end = timed(command, folder / "log")
    print(f"# {end - start:.0f} s: {' '.join(command[1:5])}", file=sys.stderr, flush=True)
    return end - start


def summary(output: Path) -> str:
    """Format the trials' states, and the phases of the first few."""
    states = [json.loads(file.read_text())["state"] for file in sorted(output.glob("trials/*/trial.json"))]
    timings = [json.loads(file.read_text())["timings"] for file in sorted(output.glob("trials/*/run.json"))[:3]]
    return f"{ {state: states.count(state) for state in set(states)} } {timings}"


def listed(values: list[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)


if __name__ == "__main__":
    main()
