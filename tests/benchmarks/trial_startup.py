"""What a trial of a sweep waits for its models: in a new process, read in one that is there, and kept there.

    python tests/benchmarks/trial_startup.py [--repeats 5] [--processes 3] [--base FOLDER] [--mixed_precision bf16]

Without `--base` on two models: the demo's, and one of SD 1.5's proportions at a quarter of its width. Files are in the
system's cache, as they are for every trial but the first. A kept model must take less time than one that is read.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

THREADS = 2
IN_NEW_PROCESS = "new"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="loads of each kind in one process")
    parser.add_argument("--processes", type=int, default=3, help="new processes")
    parser.add_argument("--base", type=Path, help="another base model's folder")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument(f"--{IN_NEW_PROCESS}", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.new:
        seconds_to_load(args.base, args.mixed_precision)
        return

    import raycontrolnet.demo
    from raycontrolnet.demo.base_model import write_random_base

    with tempfile.TemporaryDirectory(prefix="raycontrolnet-startup-") as temporary:
        bases = {"--base": args.base}
        if args.base is None:
            demo = Path(raycontrolnet.demo.__file__).with_name("base")
            bases = {"demo": demo, "SD 1.5 / 4": write_random_base(Path(temporary), "quarter")}
        print(
            f"{platform.machine()}, {os.cpu_count()} CPUs, {THREADS} threads; "
            + ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers", "transformers", "ray"))
            + f"; mixed_precision {args.mixed_precision}"
        )
        print("\n| base model, seconds | new process | read | kept | read / kept |\n|---|---|---|---|---|")
        for name, base in bases.items():
            new = [seconds_of_process(base, args.mixed_precision) for _ in range(args.processes)]
            read, kept = seconds_here(base, args.mixed_precision, args.repeats)
            ratio = statistics.median(read) / statistics.median(kept)
            goal = "reached" if ratio > 1 else "missed"
            print(f"| {name} | {shown(new)} | {shown(read)} | {shown(kept)} | {ratio:.1f} (goal: > 1): {goal} |")


def seconds_of_process(base: Path, mixed_precision: str) -> float:
    """From the start of Python to models in memory and the process's end."""
    command = [sys.executable, __file__, "--new", "--base", str(base), "--mixed_precision", mixed_precision]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return time.perf_counter() - start


def seconds_here(base: Path, mixed_precision: str, repeats: int) -> tuple[list[float], list[float]]:
    """Of loads without and with models that are kept, after one of each."""
    from raycontrolnet.model.kept import forget_models, keep_models

    def repeated(load: Callable[[Path, str], float]) -> list[float]:
        seconds = []
        for _ in range(1 + repeats):
            gc.collect()  # a run's ControlNet is gone before the next one's is made
            seconds.append(load(base, mixed_precision))
        return seconds[1:]

    read = repeated(seconds_to_load)
    keep_models()
    try:
        return read, repeated(seconds_to_load)
    finally:
        forget_models()


def seconds_to_load(base: Path, mixed_precision: str) -> float:
    """Of one load in this process, on the CPU, after the imports of a worker."""
    import torch

    import raycontrolnet.train_controlnet  # noqa: F401 (what a worker imports)
    from raycontrolnet.model.components import load_components, working_precision
    from raycontrolnet.settings import ModelConfig

    torch.set_num_threads(THREADS)
    model = ModelConfig(pretrained_model_name_or_path=str(base))
    start = time.perf_counter()
    load_components(model, device=torch.device("cpu"), dtype=working_precision(mixed_precision), seed=0)
    return time.perf_counter() - start


def shown(values: list[float]) -> str:
    """Median, and the single values in brackets."""
    return f"{statistics.median(values):.3g} ({', '.join(f'{value:.3g}' for value in values)})"


if __name__ == "__main__":
    main()
