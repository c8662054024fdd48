"""`raycontrolnet demo`: a small ControlNet, trained with the ordinary `fit` on a base model and data made on the spot."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raycontrolnet.config import TrainConfig
    from raycontrolnet.train import RunResult

FOLDER = Path("raycontrolnet-demo")

demo_settings: dict[str, Any] = {
    "pretrained_model_name_or_path": str(FOLDER / "base"),
    "train_data_dir": str(FOLDER / "circles"),
    "output_dir": str(FOLDER / "controlnet"),
    "resolution": 64,
    "train_batch_size": 8,
    "max_train_steps": 100,
    "checkpointing_steps": 50,
    "learning_rate": 1e-3,
    "lr_warmup_steps": 0,
    "seed": 0,
}


def run_demo(config: TrainConfig) -> RunResult:
    """Write the base model and the data, where they are not there yet, and train."""
    from raycontrolnet.demo.base_model import write_random_base
    from raycontrolnet.demo.circles import write_circles
    from raycontrolnet.train import fit

    base, data = FOLDER / "base", FOLDER / "circles"
    if not (base / "model_index.json").exists():
        write_random_base(base, "small")
    if not (data / "metadata.jsonl").exists():
        write_circles(data, 512, resolution=64)
    if config.validation_prompt is None:
        config = dataclasses.replace(
            config,
            validation_prompt=("red circle with blue background",),
            validation_image=(str(data / "conditioning" / "00000.png"),),
            validation_steps=config.validation_steps,
        )
    return fit(config)
