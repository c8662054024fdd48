"""Tune a ControlNet with your own `ray.tune.Tuner`: any search space, scheduler and search algorithm of Ray Tune.

    python examples/own_tuner.py          # about a minute on 2 CPU cores

Four trials try learning rates on the small base model of the package and pictures of shapes. Tune's ASHA stops those
that fall behind. The last line names the folder with the weights of the best trial.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from raycontrolnet import TrainConfig
from raycontrolnet.demo.demo import BASE
from raycontrolnet.demo.shapes import write_shapes
from raycontrolnet.tune import checkpoint_folder, trainable


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune a ControlNet with your own Tuner.")
    parser.add_argument("--output_dir", default="example-tuner")
    parser.add_argument("--num_samples", type=int, default=4)
    parser.add_argument("--max_train_steps", type=int, default=24)
    arguments = parser.parse_args()

    every = max(1, arguments.max_train_steps // 4)
    train = TrainConfig(
        pretrained_model_name_or_path=str(BASE),
        train_data_dir=str(write_shapes(Path("example-inputs") / "shapes")),
        output_dir=arguments.output_dir,
        resolution=64,
        max_train_steps=arguments.max_train_steps,
        validation_steps=every,
        validation_split=8,  # rows that no trial trains on: all are measured on them
        checkpointing_steps=every,
        lr_warmup_steps=0,
        report_to="none",
        seed=0,
    )
    tuner = tune.Tuner(
        trainable(train),
        param_space={"learning_rate": tune.loguniform(1e-5, 1e-2), "lr_scheduler": tune.choice(["constant", "cosine"])},
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            num_samples=arguments.num_samples,
            scheduler=ASHAScheduler(time_attr="step", grace_period=every, max_t=arguments.max_train_steps),
            reuse_actors=True,  # a trial takes over the process of one that has ended
        ),
        run_config=tune.RunConfig(storage_path=str(Path(arguments.output_dir).resolve() / "tune"), verbose=0),
    )
    results = tuner.fit()
    for result in results:
        print(f"{result.path}: {result.metrics['val_loss']:.4f} after {result.metrics['step']} updates")
    best = results.get_best_result()
    print(f"the best is in {checkpoint_folder(best.checkpoint) / 'controlnet'}")


if __name__ == "__main__":
    ray.init()
    main()
