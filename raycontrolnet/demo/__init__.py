"""`raycontrolnet demo`: a small ControlNet, trained by the ordinary `fit` on a base model and data made on the spot."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from raycontrolnet.errors import ConfigError

if TYPE_CHECKING:
    from raycontrolnet.config import TrainConfig
    from raycontrolnet.train import RunResult

FOLDER = Path("raycontrolnet-demo")
BASE, DATA = FOLDER / "base", FOLDER / "circles"
NUM_ROWS = 512
PROMPT = "red circle with blue background"
LOSS_WINDOW_UPDATES = 20
"""The loss of a single update is noisy: the demo compares means over the first and the last updates."""

demo_settings: dict[str, Any] = {
    "pretrained_model_name_or_path": str(BASE),
    "train_data_dir": str(DATA),
    "output_dir": str(FOLDER / "controlnet"),
    "resolution": 64,
    "train_batch_size": 8,
    "max_train_steps": 200,
    "checkpointing_steps": 100,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 0,
    "seed": 0,
}
"""What the demo sets; a minute and a half on 2 CPU cores. Flags override it."""


def run_demo(config: TrainConfig) -> RunResult:
    """Write the base model and the data, where they are wanted and not there yet, train, and say what came of it.

    Raises:
        ConfigError: if nothing can be written here; else as `fit`.
    """
    try:
        FOLDER.mkdir(exist_ok=True)
        _write_inputs(config)
    except OSError as error:
        problem = f"{FOLDER.absolute()}: cannot be written ({error.strerror}); run the demo in another folder"
        raise ConfigError([problem]) from None
    control_image = DATA / "conditioning" / "00000.png"
    if config.validation_prompt is None and control_image.is_file():
        config = dataclasses.replace(config, validation_prompt=(PROMPT,), validation_image=(str(control_image),))
    if config.output_dir == demo_settings["output_dir"] and config.resume_from_checkpoint is None:
        config = dataclasses.replace(config, output_dir=_fresh_folder(Path(config.output_dir)))

    from raycontrolnet.train import fit

    result = fit(config)
    print(_report(result, config))
    return result


def _write_inputs(config: TrainConfig) -> None:
    if config.pretrained_model_name_or_path == str(BASE) and not (BASE / "model_index.json").exists():
        _say(f"writing a small Stable Diffusion with random weights to {BASE}")
        from raycontrolnet.demo.base_model import write_random_base

        write_random_base(BASE, "small")
    if config.train_data_dir == str(DATA) and not (DATA / "metadata.jsonl").exists():
        _say(f"writing {NUM_ROWS} pictures of circles and their outlines to {DATA}")
        from raycontrolnet.demo.shapes import write_shapes

        write_shapes(DATA, NUM_ROWS, resolution=64)


def _fresh_folder(output_dir: Path) -> str:
    """`output_dir` or, where an earlier demo left checkpoints, the first of `output_dir`-2, -3 and so on without."""
    from raycontrolnet.run.checkpoint import latest

    folder, number, before = output_dir, 1, ""
    while (last := latest(folder)) is not None:
        number += 1
        before = f"{folder} holds an earlier demo (up to update {last.step})"
        folder = output_dir.with_name(f"{output_dir.name}-{number}")
    if before:
        _say(f"{before}; this one goes to {folder}")
    return str(folder)


def _report(result: RunResult, config: TrainConfig) -> str:
    """What lies where, and what to do next."""
    from raycontrolnet.run import held_out, report  # which import torch

    folder = _as_seen_from_here(result.output_dir)
    lines = [f"\nThe ControlNet is in {folder}, which diffusers' ControlNetModel.from_pretrained reads."]
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if len(losses) >= 2 * (window := LOSS_WINDOW_UPDATES):
        first, last = fmean(losses[:window]), fmean(losses[-window:])
        lines.append(f"  loss     {first:.3f} -> {last:.3f} (means of the first and last {window} updates)")
    if result.val_loss is not None:
        lines.append(f"  {held_out.in_words(held_out.read(folder))}")
    lines.append(f"  report   {folder / report.NAME}: curves, images and settings on one page, for the browser")
    grids = sorted((folder / "validation").glob(f"step-{result.step:06d}/pair-*-grid.png"))
    lines += [f"  pictures {grid}" for grid in grids]
    if config.pretrained_model_name_or_path == str(BASE):
        lines.append(
            "The base model has random weights, so the pictures are not circles; the falling loss is the result."
        )
    lines.append(
        f"\nOn your own images, in a folder like {DATA}:\n"
        "  raycontrolnet train --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\\n"
        "    --train_data_dir FOLDER --output_dir my-controlnet"
    )
    return "\n".join(lines)


def _as_seen_from_here(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
