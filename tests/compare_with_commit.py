"""Prove that a change kept every result: train tiny models with a commit and with the working tree, and compare.

    python tests/compare_with_commit.py COMMIT            # exit code 1 if any figure differs in any bit
    python tests/compare_with_commit.py --record FILE     # write the working tree's figures as JSON

Compared are losses, learning rates, gradient norms, held-out figures, weights, validation images, and a sweep's
leaderboard; never times. Both sides train on the data that COMMIT wrote, whose change shows in the row `inputs` alone,
and on models of this tree's tests/base_model.py. Takes seven minutes on two cores. Uses only public names, output files
and `raycontrolnet.demo.shapes`, to fit any layout.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from base_model import write_random_base
from diffusers import UNet2DConditionModel

import raycontrolnet
from raycontrolnet import SweepConfig, TrainConfig, fit, sweep
from raycontrolnet.demo.shapes import write_shapes

ROOT = Path(__file__).resolve().parents[1]
FIGURES = {"loss", "lr", "grad_norm", "samples", "val_loss", "val_loss_shuffled", "control_gap", "control_gap_error"}
RANKING = ("trial", "state", "stopped_at", "step", "loss", "val_loss", "control_gap")
COUNTED = ("loss", "val_loss", "weights", "images")
KINDS = {".safetensors": "weights", ".png": "images"}
Figures = dict[str, Any]  # such as "loss 3": 0.98; the number is the update, or the rank on a leaderboard
UPDATES = 6
COMMON: dict[str, Any] = {
    "pretrained_model_name_or_path": "tiny", "train_data_dir": "circles",  # in the folder of inputs
    "resolution": 32, "train_batch_size": 4, "max_train_steps": UPDATES, "checkpointing_steps": 3, "seed": 0,
    "validation_split": 5, "validation_steps": 3, "learning_rate": 1e-2, "report_to": "none", "use_gpu": False,
    "cache_latents": "off", "num_workers": "0",
}  # fmt: skip
CACHE = {"cache_latents": "on"}
CAPTIONS = {"train_data_dir": "captions", "proportion_empty_prompts": 0.3, "pretrained_model_name_or_path": "tiny_v"}
IMAGES = {"validation_prompt": "a circle", "validation_image": "circles/conditioning/00000.png"}
RESUMED = {"train_batch_size": 2, "resume_from_checkpoint": "latest"}
WIDE_HEADS = {"pretrained_model_name_or_path": "wide"}
TWO_WORKERS = {"num_workers": "2", "cpus_per_worker": 1.0, "train_batch_size": 2}
RUNS: dict[str, dict[str, Any]] = {
    "pixels": {"validation_split": 0},
    "cache": CACHE,
    "accumulation": {"gradient_accumulation_steps": 3, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
    "resumed": RESUMED,
    "resumed-cache": {**RESUMED, **CACHE},
    "captions": {**CAPTIONS, **IMAGES, "num_validation_images": 1},
    "captions-cache": {**CAPTIONS, **CACHE, "latents_dtype": "float32", "max_train_samples": 16},
    "wide-heads": {**WIDE_HEADS, **CACHE},
    "wide-heads-bf16": {**WIDE_HEADS, "mixed_precision": "bf16", "gradient_checkpointing": True},
    "two-workers": TWO_WORKERS,
    "two-workers-cache": {**TWO_WORKERS, **CAPTIONS, **CACHE},
}
SPACE = {"learning_rate": {"loguniform": [1e-4, 1e-1]}, "proportion_empty_prompts": {"uniform": [0.0, 0.5]}}
SWEPT = {**CACHE, "validation_steps": 2, "checkpointing_steps": 2, "num_workers": "1"}
ASHA: dict[str, Any] = {"max_concurrent_trials": 1, "grace_period": 2, "reduction_factor": 2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("commit", nargs="?", metavar="COMMIT", help="commit to compare the working tree with")
    given.add_argument("--record", type=Path, metavar="FILE", help="write the working tree's figures to this file")
    given.add_argument("--side", type=Path, nargs=2, help=argparse.SUPPRESS)
    if (args := parser.parse_args()).side:
        return train_all(*args.side)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # removes what is temporary, as Ctrl-C does
    with tempfile.TemporaryDirectory(prefix="raycontrolnet-compare-") as temporary:
        before, now, tree = (Path(temporary, name) for name in ("before", "now", "tree"))
        if args.record:
            args.record.write_text(json.dumps(figures_of(ROOT, now, inputs=now), indent=1) + "\n", encoding="utf-8")
            return 0
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), args.commit], check=True)
        try:
            return show(figures_of(tree, before, inputs=before), figures_of(ROOT, now, inputs=before))
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def figures_of(tree: Path, folder: Path, *, inputs: Path) -> dict[str, Figures]:
    """Train everything in a new process, with the package of `tree`, and return the figures by run."""
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "RAY_idle_worker_killing_time_threshold_ms": "600000"}
    command = [sys.executable, __file__, "--side", str(folder), str(inputs)]
    with (folder / "log").open("w") as log:
        code = subprocess.run(command, env=environment, cwd=folder, stdout=log, stderr=log, check=False).returncode
    if code:
        sys.exit(f"{(folder / 'log').read_text()}\n{tree}: the runs failed with exit code {code}")
    return json.loads((folder / "figures.json").read_text())


def train_all(folder: Path, inputs: Path) -> int:
    """Write inputs to `folder`, train everything on those in `inputs`, and write figures.json."""
    assert Path(raycontrolnet.__file__).is_relative_to(os.environ["PYTHONPATH"]), raycontrolnet.__file__
    figures = {"inputs": write_inputs(folder)}
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)  # for all runs on Ray
    figures |= {name: train(folder / "runs" / name, inputs, changed) for name, changed in RUNS.items()}
    figures |= train_sweep(folder / "runs" / "sweep", inputs)
    (folder / "figures.json").write_text(json.dumps(figures))
    return 0


def write_inputs(folder: Path) -> Figures:
    """Write three base models, one of them with heads of 40 columns, and two data sets, one with lists of captions."""
    write_random_base(folder / "tiny", "tiny")
    write_random_base(folder / "tiny_v", "tiny", prediction_type="v_prediction")
    unet = write_random_base(folder / "wide", "tiny") / "unet"
    heads = {"block_out_channels": (80, 160), "attention_head_dim": 2}  # diffusers' name for the number of heads
    torch.manual_seed(0)
    UNet2DConditionModel.from_config({**UNet2DConditionModel.load_config(unet), **heads}).save_pretrained(unet)
    write_shapes(folder / "circles", 24, resolution=32)
    metadata = write_shapes(folder / "captions", 24, resolution=32) / "metadata.jsonl"
    text = re.sub('"text": (".*?")', r'"text": [\1, "a circle", "a shape"]', metadata.read_text())
    metadata.write_text(text)
    return read_figures(folder) | {"captions": text}


def train(output_dir: Path, inputs: Path, changed: Mapping[str, Any]) -> Figures:
    """Train one model, a resumed one in two parts, and return its figures."""
    config = config_of(output_dir, inputs, changed)
    if config.resume_from_checkpoint:
        fit(replace(config, max_train_steps=UPDATES // 2, resume_from_checkpoint=None), stream=io.StringIO())
    fit(config, stream=io.StringIO())
    figures = read_figures(output_dir)
    assert {f"loss {UPDATES}", "weights diffusion_pytorch_model.safetensors"} < figures.keys()
    assert (f"val_loss {UPDATES}" in figures) == (config.validation_split != 0)
    return figures


def config_of(output_dir: Path, inputs: Path, changed: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a run that writes to `output_dir`; cached latents lie beside it."""
    settings = {**COMMON, **changed}
    for name in {"pretrained_model_name_or_path", "train_data_dir", "validation_image"} & settings.keys():
        settings[name] = str(inputs / settings[name])
    return TrainConfig(**settings, output_dir=str(output_dir), latents_cache_dir=f"{output_dir}-latents")


def train_sweep(output_dir: Path, inputs: Path) -> dict[str, Figures]:
    """Run a sweep that stops weak trials early, one trial at a time so that its order is fixed."""
    shared = config_of(output_dir, inputs, SWEPT)
    sweep(SweepConfig(train=shared, space=SPACE, num_samples=4, **ASHA), stream=io.StringIO())
    with (output_dir / "leaderboard.csv").open(newline="") as file:
        ranking = list(csv.DictReader(file))
    assert [row["state"] for row in ranking] == ["finished", "stopped", "stopped", "stopped"], ranking
    names = (*RANKING, *(f"setting:{name}" for name in SPACE))
    figures = {"sweep": {f"{name} {rank}": row[name] for rank, row in enumerate(ranking, start=1) for name in names}}
    trials = {f"trial-{row['trial']}": read_figures(output_dir / "trials" / row["trial"]) for row in ranking}
    assert all({"loss 2", "val_loss 2"} < trial.keys() for trial in trials.values())
    return figures | trials


def read_figures(folder: Path) -> Figures:
    """Read the figures of the run in `folder`, if it is one, and hash all weights and images there."""
    figures: Figures = {}
    for path in sorted(folder.glob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            figures |= {f"{name} {row['step']}": value for name, value in row.items() if name in FIGURES}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in KINDS):
        figures[f"{KINDS[path.suffix]} {path.relative_to(folder)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return figures


def show(before: Mapping[str, Figures], now: Mapping[str, Figures]) -> int:
    """Print a table with a line per run, and return the exit code."""
    print(f"{'run':<18}", *(f"{name:>8}" for name in COUNTED), " all figures")
    different = 0
    for run, figures in before.items():
        one, other = ({name: json.dumps(value) for name, value in side.items()} for side in (figures, now[run]))
        wrong = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        counts = [sum(name.split()[0] == figure for name in one) for figure in COUNTED]
        print(f"{run:<18}", *(f"{n:>8}" for n in counts), f" {len(one)}: {len(wrong) or 'none'} differ")
        for name in wrong[:3]:
            print(f"    {name}: {one.get(name, 'missing'):.24} before, {other.get(name, 'missing'):.24} now")
        different += len(wrong)
    print(f"{different} figures differ" if different else "all figures are equal, bit for bit")
    return min(different, 1)


if __name__ == "__main__":
    sys.exit(main())
