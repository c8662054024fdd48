"""Speed of `raycontrolnet train`, from pixels and from cached latents, against the bare loop of reference_loop.py.

    python tests/benchmarks/train_speed.py [--size sd15] [--steps 23] [--repeats 3] [-- FLAGS OF raycontrolnet train]

The three run in turns, on a base model of SD 1.5's proportions, or of its size, and circles of 256 pixels, with
`--threads` CPU threads each. The cache is made beforehand: this is the steady state. Goals at a quarter of its width:
images/s at least as many from pixels and 1.35 times as many from the cache; at its size, where large tensors cost page
faults, 1.15 and 1.5 times as many. At most 25 s more from the command to the first update.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from reference_loop import WARM_UP_UPDATES, images_per_second

REFERENCE = "reference"
GOALS = {"quarter": (1.0, 1.35), "sd15": (1.15, 1.5)}
"""Times the reference's images/s, from pixels and from the cache, by the size of the base."""
RESOLUTION = 256
"""Pixels; the ratio of VAE to UNet work is SD 1.5's at 512."""


@dataclass(frozen=True)
class Speed:
    images_per_second: float
    """After the warm-up."""
    first_update_s: float
    """From the command to the end of the first update."""
    besides_updates_s: float
    """From the command to its end, less the updates after the first: start-up, the first update, and the final save."""


def main() -> None:
    arguments, train_flags = split_arguments(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=23, help=f"updates a run; the first {WARM_UP_UPDATES} warm up")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each side")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--size", choices=[*GOALS], default="quarter", help="sd15 needs 16 GB of memory")
    args = parser.parse_args(arguments)
    if args.steps <= WARM_UP_UPDATES:
        parser.error(f"--steps={args.steps}: must be more than {WARM_UP_UPDATES}")

    with tempfile.TemporaryDirectory(prefix="raycontrolnet-speed-") as temporary:
        folder = Path(temporary)
        write_inputs(folder, size=args.size)
        sides: dict[str, list[str] | None] = {
            REFERENCE: None,
            "raycontrolnet from pixels": ["--cache_latents", "off"],
            "raycontrolnet from the cache": ["--cache_latents", "on", "--latents_cache_dir", str(folder / "latents")],
        }
        timed(
            raycontrolnet("prepare", folder, ["--latents_cache_dir", str(folder / "latents")]), folder / "prepare.log"
        )
        speeds: dict[str, list[Speed]] = {name: [] for name in sides}
        for repeat in range(args.repeats):
            for name, runs in speeds.items():
                flags, run_name = sides[name], f"{name.replace(' ', '-')}-{repeat}"
                if flags is None:
                    runs.append(run_reference(folder, run_name, args))
                else:
                    runs.append(run_raycontrolnet(folder, run_name, args, [*flags, *train_flags]))
                print(f"# {name} {repeat + 1}: {runs[-1]}", file=sys.stderr, flush=True)
    print(table(speeds, args, train_flags))


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments before and after `--`."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:place]), list(arguments[place + 1 :])


def write_inputs(folder: Path, num_images: int = 64, size: str = "quarter") -> None:
    """Write `base`, `controlnet` and `data` below `folder`."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    from raycontrolnet.demo.shapes import write_shapes

    sys.path.append(str(Path(__file__).parents[1]))
    from base_model import CONDITIONING_EMBEDDING_CHANNELS, write_random_base

    if size == "sd15":
        write_random_sd15(folder / "base")
    else:
        write_random_base(folder / "base", "quarter")
    unet = UNet2DConditionModel.from_pretrained(folder / "base", subfolder="unet")
    # diffusers' conditioning embedding has SD 1.5's width whatever the UNet's: a quarter of it here
    embedding = (
        {} if size == "sd15" else {"conditioning_embedding_out_channels": CONDITIONING_EMBEDDING_CHANNELS["quarter"]}
    )
    ControlNetModel.from_unet(unet, **embedding).save_pretrained(folder / "controlnet")
    write_shapes(folder / "data", num_images, resolution=RESOLUTION)


def write_random_sd15(folder: Path) -> None:
    """Write a base of Stable Diffusion 1.5's size with random weights, in fp32: 4.3 GB."""
    from base_model import write_parts, write_tokenizer
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from full_size import SD15
    from transformers import CLIPTextConfig, CLIPTextModel

    write_tokenizer(folder / "tokenizer")
    parts = {
        "unet": UNet2DConditionModel.from_config(SD15["unet"]),
        "vae": AutoencoderKL.from_config(SD15["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**SD15["text_encoder"])),
        "scheduler": DDPMScheduler.from_config(SD15["scheduler"]),
    }
    write_parts(folder, parts)


def run_reference(folder: Path, name: str, args: argparse.Namespace) -> Speed:
    script = Path(__file__).with_name("reference_loop.py")
    command = [sys.executable, str(script), "--base", str(folder / "base"), "--data", str(folder / "data")]
    command += ["--resolution", str(RESOLUTION), "--batch_size", str(args.batch_size), "--steps", str(args.steps)]
    command += ["--threads", str(args.threads), "--controlnet", str(folder / "controlnet")]
    start, end = timed(command, folder / f"{name}.log")
    result = json.loads((folder / f"{name}.log").read_text().strip().splitlines()[-1])
    return speed_of(result["update_times"], start, end, args)


def run_raycontrolnet(folder: Path, name: str, args: argparse.Namespace, train_flags: Sequence[str]) -> Speed:
    output = folder / name
    command = raycontrolnet("train", folder, ["--controlnet_model_name_or_path", str(folder / "controlnet")])
    command += ["--train_batch_size", str(args.batch_size), "--max_train_steps", str(args.steps)]
    command += ["--output_dir", str(output), "--seed", "0", "--report_to", "none", "--checkpointing_steps", "1000000"]
    command += ["--cpus_per_worker", str(args.threads)]  # and so its threads; on two CPUs this is the default
    start, end = timed([*command, *train_flags], folder / f"{name}.log")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return speed_of([line["time"] for line in lines], start, end, args)


def raycontrolnet(command: str, folder: Path, flags: Sequence[str]) -> list[str]:
    """Return the command line on the benchmark's base and data."""
    line = [sys.executable, "-m", "raycontrolnet", command, "--pretrained_model_name_or_path", str(folder / "base")]
    return [*line, "--train_data_dir", str(folder / "data"), "--resolution", str(RESOLUTION), *flags]


def timed(command: Sequence[str], log: Path) -> tuple[float, float]:
    """Run `command` without GPU, its output into `log`; return unix seconds of its start and end."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    start = time.time()
    with log.open("w") as file:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{log.read_text()[-5000:]}")
    return start, time.time()


def speed_of(update_times: list[float], start: float, end: float, args: argparse.Namespace) -> Speed:
    if len(update_times) != args.steps:
        sys.exit(f"{len(update_times)} updates were recorded, not {args.steps}")
    return Speed(
        images_per_second=images_per_second(update_times, args.batch_size),
        first_update_s=update_times[0] - start,
        besides_updates_s=end - start - (update_times[-1] - update_times[0]),
    )


def table(speeds: dict[str, list[Speed]], args: argparse.Namespace, train_flags: Sequence[str]) -> str:
    """Format Markdown for RESULTS.md: medians, with the single runs in brackets."""
    lines = [
        f"{platform.machine()}, {os.cpu_count()} CPUs, {args.threads} threads; "
        + ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers", "ray"))
        + f"; {args.size}, batch {args.batch_size}, {RESOLUTION} px, {args.steps} updates a run"
        + (f"; {' '.join(train_flags)}" if train_flags else ""),
        "",
        "| | images/s | command to first update, s | all but the updates, s |",
        "|---|---|---|---|",
    ]
    medians = {}
    for name, runs in speeds.items():
        columns = {
            "images_per_second": [run.images_per_second for run in runs],
            "first_update_s": [run.first_update_s for run in runs],
            "besides_updates_s": [run.besides_updates_s for run in runs],
        }
        medians[name] = {column: statistics.median(values) for column, values in columns.items()}
        cells = [
            f"{statistics.median(values):.3g} ({', '.join(f'{value:.3g}' for value in values)})"
            for values in columns.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    theirs = medians.pop(REFERENCE)
    for (name, ours), goal in zip(medians.items(), GOALS[args.size], strict=True):
        ratio = ours["images_per_second"] / theirs["images_per_second"]
        first, besides = (ours[column] - theirs[column] for column in ("first_update_s", "besides_updates_s"))
        lines.append(f"| {name}, against {REFERENCE} | {ratio:.3f}x | {first:+.1f} | {besides:+.1f} |")
        lines.append(f"| goal | >= {goal}x: {verdict(ratio >= goal)} | <= +25: {verdict(first <= 25)} | |")
    return "\n".join(lines)


def verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


if __name__ == "__main__":
    main()
