"""Train a ControlNet from Python. Takes a minute on the demo's base model and data that it writes.

    python examples/train.py                                  # writes a small data set, trains on it
    python examples/train.py my-images BASE_MODEL             # your own data, on a base model from a folder or the Hub
    RAY_ADDRESS=auto python examples/train.py my-images BASE_MODEL --num_workers 4    # on a machine of a Ray cluster

On a cluster, give paths that mean the same on all of its machines.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from raycontrolnet import TrainConfig, fit


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a ControlNet from Python.")
    parser.add_argument("data", nargs="?", help="folder with images and metadata.jsonl")
    parser.add_argument("base", nargs="?", help="base model: a local folder or a Hub id")
    parser.add_argument("--output_dir", default="example-controlnet")
    parser.add_argument("--num_workers", default="1")
    parser.add_argument("--max_train_steps", type=int, default=50)
    arguments = parser.parse_args()
    if arguments.data and not arguments.base:
        parser.error("give the base model as well")

    settings: dict[str, Any] = {
        "output_dir": arguments.output_dir,
        "num_workers": arguments.num_workers,
        "max_train_steps": arguments.max_train_steps,
    }
    if arguments.data:
        settings |= {"train_data_dir": arguments.data, "pretrained_model_name_or_path": arguments.base}
    else:
        settings |= small_settings(Path("example-inputs"))
    result = fit(TrainConfig(**settings))
    print(f"{result.step} updates in {result.seconds:.0f} s, loss {result.loss}: {result.output_dir}")


def small_settings(folder: Path) -> dict[str, Any]:
    """Return the settings for a data set of shapes, written to `folder`, and the demo's base model."""
    from raycontrolnet.demo.demo import BASE
    from raycontrolnet.demo.shapes import write_shapes

    return {
        "train_data_dir": str(write_shapes(folder / "shapes")),
        "pretrained_model_name_or_path": str(BASE),
        "resolution": 64,
        "learning_rate": 1e-3,
    }


if __name__ == "__main__":
    main()
