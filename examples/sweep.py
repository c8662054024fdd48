"""Find a learning rate from Python. Takes a minute on the small base model and data that it writes.

    python examples/sweep.py                                  # writes a small base model and data, and sweeps on them
    python examples/sweep.py my-images BASE_MODEL             # your own data, on a base model from a folder or the Hub
    RAY_ADDRESS=auto python examples/sweep.py my-images BASE_MODEL    # on a machine of a Ray cluster

The same command again with --resume goes on where a sweep was cut off.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from raycontrolnet import SweepConfig, TrainConfig, sweep


def main() -> None:
    parser = argparse.ArgumentParser(description="Find a learning rate from Python.")
    parser.add_argument("data", nargs="?", help="folder with images and metadata.jsonl")
    parser.add_argument("base", nargs="?", help="base model: a local folder or a Hub id")
    parser.add_argument("--output_dir", default="example-sweep")
    parser.add_argument("--num_samples", type=int, default=4)
    parser.add_argument("--max_train_steps", type=int, default=40)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    if arguments.data and not arguments.base:
        parser.error("give the base model as well")

    settings: dict[str, Any] = {
        "output_dir": arguments.output_dir,
        "max_train_steps": arguments.max_train_steps,
        "validation_steps": max(1, arguments.max_train_steps // 4),
        "validation_split": 8,  # rows that no trial trains on: all are measured on them
        "seed": 0,
    }
    if arguments.data:
        settings |= {"train_data_dir": arguments.data, "pretrained_model_name_or_path": arguments.base}
    else:
        settings |= small_settings(Path("example-inputs"))
    result = sweep(
        SweepConfig(
            train=TrainConfig(**settings),
            space={
                "learning_rate": {"loguniform": [1e-5, 1e-2]},
                "lr_scheduler": {"choice": ["constant", "cosine"]},
            },
            num_samples=arguments.num_samples,
            resume=arguments.resume,
        )
    )
    for trial in result.trials:
        print(f"{trial.record.name} {trial.record.state}: {result.objective} {trial.value(result.objective):.4f}, "
              f"{dict(trial.record.settings)}")  # fmt: skip
    print(f"the best is in {result.best_dir}")


def small_settings(folder: Path) -> dict[str, Any]:
    """Return the settings for a data set of shapes and the small base model of the package."""
    from raycontrolnet.demo.demo import BASE
    from raycontrolnet.demo.shapes import write_shapes

    return {
        "train_data_dir": str(write_shapes(folder / "shapes")),
        "pretrained_model_name_or_path": str(BASE),
        "resolution": 64,
        "lr_warmup_steps": 0,
    }


if __name__ == "__main__":
    main()
