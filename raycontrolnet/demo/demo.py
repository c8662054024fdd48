"""`raycontrolnet demo`: a ControlNet learns to fill outlines, trained by the ordinary `fit` on a small base model.

The package contains the base model (made by tests/train_base.py); the data is drawn here.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycontrolnet.errors import ConfigError, RunError
from raycontrolnet.storage.uri import is_uri
from raycontrolnet.text import decimals, plus_minus

if TYPE_CHECKING:
    from raycontrolnet.config.output_settings import ValidationConfig
    from raycontrolnet.config.train_config import TrainConfig
    from raycontrolnet.launch.fit import RunResult

BASE = Path(__file__).parent / "base"
"""The base model in the package."""
FOLDER = Path("raycontrolnet-demo")
DATA, UNSEEN, UNTRAINED = (FOLDER / name for name in ("shapes", "unseen", "untrained"))
NUM_ROWS, NUM_UNSEEN = 2048, 100
SEED, UNSEEN_SEED = 0, 1000
"""The base model was trained on rows of seed 1."""
VALIDATED = 2
"""Unseen rows that validation draws."""
PICTURE, FIGURES = "demo.png", "demo.json"

demo_settings: dict[str, Any] = {
    "pretrained_model_name_or_path": str(BASE),
    "train_data_dir": str(DATA),
    "output_dir": str(FOLDER / "controlnet"),
    "resolution": 64,
    "train_batch_size": 16,
    "max_train_steps": 1000,
    "checkpointing_steps": 500,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 50,
    "validation_steps": 100,
    "num_validation_images": 1,
    "guidance_scale": 3.0,
    "seed": 0,
}
"""Settings of the demo: less than five minutes on 2 CPU cores. Flags override them."""


def run_demo(config: TrainConfig) -> RunResult:
    """Write the data unless it is there, train, evaluate, and print the results.

    Raises:
        ConfigError: if nothing can be written here; else as `fit`.
    """
    started = time.monotonic()
    # With another base model, other data or another initial ControlNet, nothing is compared.
    given = (config.pretrained_model_name_or_path, config.train_data_dir, config.controlnet_model_name_or_path)
    own = (*given, config.dataset_name) == (str(BASE), str(DATA), None, None)
    try:
        FOLDER.mkdir(exist_ok=True)
        write_inputs(own or config.train_data_dir == str(DATA), own, config.seed or 0)
    except OSError as error:
        problem = f"{FOLDER.absolute()}: cannot be written ({error.strerror}); run the demo in another folder"
        raise ConfigError([problem]) from None
    if own:
        config = dataclasses.replace(config, **_own_settings(config))
    if is_uri(config.output_dir):
        raise ConfigError([f"--output_dir={config.output_dir}: the demo draws from a folder on this machine; name one"])
    if config.output_dir == demo_settings["output_dir"] and config.resume_from_checkpoint is None:
        config = dataclasses.replace(config, output_dir=_fresh_folder(Path(config.output_dir)))

    if own and (number := num_compared(config)) < NUM_UNSEEN:
        whole = demo_settings["max_train_steps"]
        _say(
            f"a short demo, of {config.max_train_steps} updates in place of {whole:,}: before and after are compared "
            f"on {number} unseen outlines, not on {NUM_UNSEEN}"
        )

    from raycontrolnet.launch.fit import fit

    result = fit(config)
    here, folder = Path.cwd(), result.output_dir
    folder = folder.relative_to(here) if folder.is_relative_to(here) else folder
    print(f"\nThe ControlNet is in {folder}, which diffusers' ControlNetModel.from_pretrained reads.", flush=True)
    if own:
        print(_comparison(folder, config))
    print(_report(result, folder, time.monotonic() - started))
    return result


def num_compared(config: TrainConfig) -> int:
    """Return the number of unseen outlines to draw: fewer for a run that is shorter than the demo, in proportion.

    They take most of a short demo's time. At least as many as the picture shows.
    """
    from raycontrolnet.demo.evaluation import SHOWN

    whole = demo_settings["max_train_steps"]
    number = round(NUM_UNSEEN * (config.max_train_steps or whole) / whole)
    return min(NUM_UNSEEN, max(SHOWN, number))


def write_inputs(train: bool, compare: bool, seed: int) -> None:
    """Write what is not there: the data to `train` on, the unseen rows and the ControlNet of `seed` to `compare`."""
    from raycontrolnet.demo.shapes import write_shapes

    data = ((DATA, NUM_ROWS, SEED, train), (UNSEEN, NUM_UNSEEN, UNSEEN_SEED, compare))
    for folder, num_rows, data_seed, wanted in data:
        if wanted and not (folder / "metadata.jsonl").exists():
            _say(f"writing {num_rows:,} pictures of shapes and their outlines to {folder}")
            write_shapes(folder, num_rows, resolution=64, seed=data_seed)
    if compare:
        _write_untrained_controlnet(seed)


def _write_untrained_controlnet(seed: int) -> None:
    """Write a ControlNet copied from the base model's UNet, as training makes it, but in proportion to the base.

    diffusers makes the conditioning embedding as wide as for SD 1.5, which would take most of a small model's time.
    """
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(BASE, subfolder="unet")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 48, 128))
    controlnet.save_pretrained(UNTRAINED)


def _own_settings(given: ValidationConfig) -> dict[str, Any]:
    """Return the settings to start from the untrained ControlNet, and to validate on unseen rows by default."""
    from raycontrolnet.demo.shapes import read_rows

    settings: dict[str, Any] = {"controlnet_model_name_or_path": str(UNTRAINED)}
    if given.validation_prompt is None and given.validation_image is None:
        rows = read_rows(UNSEEN)[:VALIDATED]
        settings["validation_prompt"] = tuple(text for _, text in rows)
        settings["validation_image"] = tuple(str(path) for path, _ in rows)
        settings["control_fidelity"] = "shape"
    return settings


def _fresh_folder(output_dir: Path) -> str:
    """Return `output_dir`, or the first of `output_dir`-2, -3, ... without checkpoints of an earlier demo."""
    from raycontrolnet.storage.checkpoint import latest

    folder, number, before = output_dir, 1, ""
    while (last := latest(folder)) is not None:
        number += 1
        before = f"{folder} holds an earlier demo (up to update {last.step})"
        folder = output_dir.with_name(f"{output_dir.name}-{number}")
    if before:
        _say(f"{before}; this one goes to {folder}")
    return str(folder)


def _comparison(folder: Path, config: TrainConfig) -> str:
    """Evaluate the ControlNet before and after training; write the figures and a picture to `folder`.

    Returns:
        The comparison in words.

    Raises:
        RunError: if a file cannot be written, as on a full disk; the ControlNet is complete.
    """
    from raycontrolnet.demo.evaluation import draw_picture, evaluate

    found, number = {}, num_compared(config)
    for name, controlnet in (("before", UNTRAINED), ("after", folder)):
        _say(f"drawing for {number} unseen outlines {name} training")
        found[name] = evaluate(
            controlnet,
            BASE,
            UNSEEN,
            folder / "obedience" / name,
            number=number,
            guidance_scale=config.guidance_scale,
            use_gpu=config.use_gpu,
        )
    try:
        (folder / FIGURES).write_text(json.dumps({name: one.figures for name, one in found.items()}) + "\n")
        draw_picture(folder / PICTURE, found["before"], found["after"], folder)
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written ({error.strerror or error}); the ControlNet is complete"
        ) from error
    lines = [f"Results on {number} outlines that it has never seen (fidelity: overlap of asked and drawn shape):"]
    for name, one in found.items():
        lines.append(
            f"  {name:8} control fidelity {decimals(one.fidelity.mean, 2)}{plus_minus(one.fidelity.error)}, "
            f"colours right in {one.right_colours:.0%}"
        )
    lines.append(f"  picture  {folder / PICTURE}")
    return "\n".join(lines)


def _report(result: RunResult, folder: Path, seconds: float) -> str:
    """Describe the results, and what to do next."""
    from raycontrolnet.report import page
    from raycontrolnet.text import duration
    from raycontrolnet.training import held_out

    lines = []
    if result.val_loss is not None:
        lines.append(f"  {held_out.in_words(held_out.read(folder))}")
    lines.append(f"  report   {folder / page.REPORT_FILE}: curves, images and settings on one page, for the browser")
    lines.append(f"  time     {duration(seconds)}, of which training {duration(result.seconds)}")
    lines.append(
        f"\nOn your own images, in a folder like {DATA}:\n"
        "  raycontrolnet train --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\\n"
        "    --train_data_dir FOLDER --output_dir my-controlnet\n"
        "From pictures and captions alone, `raycontrolnet condition --help` says how to make the control images."
    )
    return "\n".join(lines)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
