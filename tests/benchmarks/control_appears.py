"""Updates until control appears in the demo's training, with several settings and seeds.

    python tests/benchmarks/control_appears.py                                # the objectives, three seeds: hours
    python tests/benchmarks/control_appears.py --settings mine.yaml --seeds 0 1 2 3 4
    python tests/benchmarks/control_appears.py --updates 40 --every 10 --rows 16 --seeds 0    # to see that it works

The settings are lines of `name: flags`, as in `min-SNR: --snr_gamma 5`; the first ones are what the others are compared
with, seed by seed. A run is the demo's, with its data and base model, measured on held-out rows every few updates. It
ends once control has appeared: `--confirm` measurements after the first one, all with a gap of more than twice its
standard error and more than 1% of the loss. Each result is a line of control_appears.jsonl in --folder, and what is
there is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from raycontrolnet.demo.demo import UNTRAINED, demo_settings, write_inputs
from raycontrolnet.training import held_out

RESULTS = "control_appears.jsonl"
SETTINGS = {
    "plain": "",
    "min-SNR 5": "--snr_gamma 5",
    "min-SNR 1": "--snr_gamma 1",
    "logit-normal": "--timestep_sampling logit_normal",
    "high noise 3": "--timestep_sampling high_noise",
    "high noise 2": "--timestep_sampling high_noise --high_noise_power 2",
    "offset 0.1": "--noise_offset 0.1",
    "perturbation 0.1": "--input_perturbation 0.1",
    "huber 0.1": "--loss huber",
    "huber 1": "--loss huber --huber_delta 1",
}
POLL_S = 1.0
NOT_TRAINING = (
    "validation_steps",
    "num_validation_images",
    "guidance_scale",
    "output_dir",
    "seed",
    "checkpointing_steps",
)
"""Settings of the demo that are given anew or only matter for its images."""

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=Path, help="YAML file of `name: flags`; by default the objectives")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=1000, help="of a run in which control does not appear")
    parser.add_argument("--every", type=int, default=20, help="updates between two measurements")
    parser.add_argument("--rows", type=int, default=64, help="rows held out")
    parser.add_argument("--confirm", type=int, default=3, help="measurements that confirm the first one")
    parser.add_argument("--folder", type=Path, default=Path("control-appears"), help="for data, runs and results")
    args = parser.parse_args()
    # Begun in a shell's background, it ignores SIGINT, and its runs would too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    settings = read_settings(args.settings)
    args.folder.mkdir(parents=True, exist_ok=True)
    results = args.folder / RESULTS
    design = {name: getattr(args, name) for name in ("updates", "every", "rows", "confirm")}
    for seed in args.seeds:  # all settings of a seed first, so that a part of the table is one of its own
        for name, flags in settings.items():
            key = {"name": name, "flags": flags, "seed": seed, **design}
            if not found(read(results), key):
                result = {**key, **run(args.folder.resolve(), key)}
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(result) + "\n")
                print(
                    f"# {name}, seed {seed}: {result['appeared']} ({result['seconds']:.0f} s)",
                    file=sys.stderr,
                    flush=True,
                )
    rows = [found(read(results), {"name": name, "flags": flags, "seed": seed, **design})
            for name, flags in settings.items() for seed in args.seeds]  # fmt: skip
    print("\n".join(table([row for row in rows if row])))


def read_settings(file: Path | None) -> dict[str, str]:
    """Return name -> flags of a YAML file, or the objectives."""
    given = SETTINGS if file is None else yaml.safe_load(file.read_text(encoding="utf-8"))
    return {str(name): str(flags or "") for name, flags in given.items()}


def read(results: Path) -> list[Result]:
    """Return the results so far; a line that was cut off is left out."""
    rows = []
    for line in results.read_text(encoding="utf-8").splitlines() if results.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def found(results: Iterable[Result], key: Mapping[str, Any]) -> Result | None:
    """Return the result of the same name, flags, seed and design; None if there is none."""
    return next((row for row in results if key.items() <= row.items()), None)


def run(folder: Path, key: Mapping[str, Any]) -> Result:
    """Train once, until control has appeared or to the end; return the update, and the last figures."""
    before = Path.cwd()
    os.chdir(folder)  # where the demo's paths lead
    try:
        write_inputs(train=True, compare=True, seed=key["seed"])
        out = Path("run")
        shutil.rmtree(out, ignore_errors=True)
        started = time.monotonic()
        with Path("log").open("w") as log:
            environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}  # one latent cache for all
            process = subprocess.Popen(command(key, out), stdout=log, stderr=log, env=environment)
            try:
                code = _wait(process, out, key["confirm"])
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        records = held_out.read(out)
        if code not in (0, 128 + signal.SIGINT) or not records:
            sys.exit(f"{folder / 'log'}: the run of {key['name']}, seed {key['seed']} failed with exit code {code}")
        last = {name: records[-1][name] for name in ("step", "val_loss", "control_gap", "control_gap_error")}
        return {"appeared": held_out.control_appeared(records), **last, "seconds": time.monotonic() - started}
    finally:
        os.chdir(before)


def command(key: Mapping[str, Any], out: Path) -> list[str]:
    """Return the command of a run."""
    shared = {name: value for name, value in demo_settings.items() if name not in NOT_TRAINING}
    shared |= {
        "controlnet_model_name_or_path": UNTRAINED, "output_dir": out, "seed": key["seed"], "num_workers": 0,
        "max_train_steps": key["updates"], "checkpointing_steps": key["updates"], "validation_steps": key["every"],
        "validation_split": key["rows"], "report_to": "none",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in shared.items()]
    return [sys.executable, "-m", "raycontrolnet", "train", *flags, *shlex.split(key["flags"])]


def _wait(process: subprocess.Popen[Any], out: Path, confirm: int) -> int:
    """Return the run's exit code; interrupt it once control has been seen `confirm` times after the first."""
    interrupted = False
    while (code := process.poll()) is None:
        records = held_out.read(out)
        since = held_out.control_appeared(records)
        after = [record for record in records if since is not None and record["step"] > since]
        if len(after) >= confirm and not interrupted:
            process.send_signal(signal.SIGINT)
            interrupted = True
        time.sleep(POLL_S)
    return code


def table(results: Sequence[Result]) -> list[str]:
    """Return the lines of a Markdown table: mean and standard error over the seeds, and against the first settings.

    A run without control counts with all its updates, and its mean as at least that.
    """
    by_name: dict[str, dict[int, Result]] = {}
    for result in results:
        by_name.setdefault(result["name"], {})[result["seed"]] = result
    first = next(iter(by_name.values()), {})
    lines = ["| settings | flags | updates until control | against the first | by seed |", "|---|---|---|---|---|"]
    for name, runs in by_name.items():
        bound = "≥ " if any(one["appeared"] is None for one in runs.values()) else ""
        pairs = [updates_of(one) - updates_of(first[seed]) for seed, one in runs.items() if seed in first]
        compared = "" if runs is first else in_words(pairs, signed=True)
        seeds = ", ".join("none" if one["appeared"] is None else str(one["appeared"]) for one in runs.values())
        flags = next(iter(runs.values()))["flags"]
        code = f"`{flags}`" if flags else ""
        mean = in_words([updates_of(one) for one in runs.values()])
        lines.append(f"| {name} | {code} | {bound}{mean} | {compared} | {seeds} |")
    return lines


def updates_of(result: Result) -> int:
    """Return the update since which there is control, or all updates."""
    return result["updates"] if result["appeared"] is None else result["appeared"]


def in_words(values: Sequence[float], *, signed: bool = False) -> str:
    """Return the mean with its standard error, which needs two values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{'+' if signed else ''}.0f}"
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.0f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
