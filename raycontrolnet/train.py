"""The driver of one training run: `fit(config) -> RunResult`.

Checks everything that can be checked before anything is loaded, hands a `Job` to the workers of a Ray Train
`TorchTrainer`, shows the progress, and finishes what they left: model card, run.json, the Hub.
`python -m raycontrolnet.train ARGS` is `raycontrolnet train ARGS`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from raycontrolnet import __version__
from raycontrolnet.cluster import (
    WorkerResources,
    interruptible_trainer,
    logging_to,
    ray_session,
    shown_on,
    worker_resources,
)
from raycontrolnet.config import TrainConfig, changed_settings, public_settings
from raycontrolnet.data.stream import execution_options, ray_dataset
from raycontrolnet.errors import ConfigError, Interrupted, RunError, UserError, in_one_line, root_cause
from raycontrolnet.latent_plan import LatentPlan
from raycontrolnet.preflight import CheckedRun, check, check_device, versions, with_absolute_paths
from raycontrolnet.prepare_latents import SEVERAL_MACHINES, Encode, cache_for_run, here, on_ray
from raycontrolnet.run import checkpoint as checkpoints
from raycontrolnet.run import export
from raycontrolnet.run.job import LOG, Job, begin, end, read_failure
from raycontrolnet.run.progress import Progress, duration
from raycontrolnet.run.trained import CONFIG

if TYPE_CHECKING:
    import ray

logger = logging.getLogger(__name__)

ENDLESS = 2**40
STATUS = "run.json"


@dataclass(frozen=True)
class RunResult:
    """What a finished run left."""

    output_dir: Path
    step: int
    """Optimizer updates done, those of earlier parts of the run included."""
    samples: int
    """Samples consumed."""
    loss: float | None
    """Of the last update: mean over workers and accumulation; None if there was nothing left to do."""
    checkpoint: Path | None
    """The last checkpoint."""
    seconds: float
    timings: dict[str, float]
    """Seconds by phase in the worker of rank 0."""
    hub_url: str | None = None
    """Where the weights were pushed to."""


def fit(config: TrainConfig, *, stream: TextIO | None = None) -> RunResult:
    """Train a ControlNet.

    Uses the Ray that is connected, or `config.address`, or RAY_ADDRESS, or starts a local one for the run;
    with `num_workers=0` it trains in this process, without Ray.

    Args:
        config: all settings.
        stream: where progress is shown; standard error by default.

    Raises:
        UserError: bad settings, data or models (exit code 2 on the command line).
        RunError: the run failed; the last checkpoint stands (exit code 1).
        Interrupted: Ctrl-C; the last checkpoint stands (exit code 130).
    """
    with shown_on(stream) as shown:
        return _fit(config, shown)


def _fit(config: TrainConfig, stream: TextIO) -> RunResult:
    started = time.time()
    output_dir = Path(config.output_dir).expanduser().resolve()
    config = with_absolute_paths(config, output_dir)
    run = check(config, output_dir)
    with logging_to(output_dir / LOG), _status_kept(output_dir, started) as status, _interruption_explained(run):
        if config.worker_range == (0, 0):
            summary = _train_here(run, stream)
        else:
            with ray_session(config.address):
                summary = _train_on_ray(run, stream)
        last = run.last_checkpoint()
        status |= {**summary, "status": "finished", "checkpoint": last.path.name if last else None}
        export.write_model_card(output_dir, run.config, status)
        hub_url = _push(run, status, stream) if config.push_to_hub else None
    seconds = time.time() - started
    stream.write(f"done in {duration(seconds)}: {summary['step']} updates; weights in {output_dir}\n")
    return RunResult(
        output_dir=output_dir,
        step=summary["step"],
        samples=summary["samples"],
        loss=summary["loss"],
        checkpoint=last.path if last else None,
        seconds=seconds,
        timings=summary["timings"],
        hub_url=hub_url,
    )


def _train_here(run: CheckedRun, stream: TextIO) -> dict[str, Any]:
    """The worker loop in this process: Ray Train's local mode, for debugging and quick tests."""
    import torch
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from raycontrolnet.train_controlnet import train_controlnet

    use_gpu = torch.cuda.is_available() if run.config.use_gpu is None else run.config.use_gpu
    check_device(run.config, use_gpu=use_gpu, has_gpu=torch.cuda.is_available())
    run = _with_latents(run, 1, here(run.config), stream)
    job = run.job(use_gpu=use_gpu, threads=None, local=True)
    _announce(run, 1, stream, use_gpu=use_gpu)
    begin(job)
    trainer = TorchTrainer(
        train_controlnet,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=0),
        run_config=RunConfig(storage_path=str(run.output_dir.parent), name=run.output_dir.name),
    )
    with _failures_explained(run), _progress(run, 1, stream):
        return dict(trainer.fit().return_value)


def _train_on_ray(run: CheckedRun, stream: TextIO) -> dict[str, Any]:
    import ray
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig

    from raycontrolnet.train_controlnet import train_controlnet

    resources = worker_resources(run.config)
    check_device(run.config, use_gpu=resources.use_gpu, has_gpu=resources.use_gpu)
    fewest, most = resources.num_workers
    run = _with_latents(run, most, on_ray(resources), stream, shared=not resources.one_machine)
    job = run.job(use_gpu=resources.use_gpu, threads=None if resources.use_gpu else resources.threads, local=False)
    _announce(run, most, stream, use_gpu=resources.use_gpu)
    if resources.waits_for:
        stream.write(f"waiting for {resources.waits_for}\n")
    begin(job)
    trainer = interruptible_trainer()(
        train_controlnet,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=resources.use_gpu,
            resources_per_worker=_resources_per_worker(resources),
            accelerator_type=resources.accelerator_type,
        ),
        run_config=RunConfig(
            storage_path=str(run.output_dir.parent),
            name=run.output_dir.name,
            failure_config=FailureConfig(max_failures=run.config.max_failures),
        ),
        datasets={"train": _dataset_factory(run, job, ray.put(run.loader))},
        dataset_config=DataConfig(
            execution_options=execution_options(_batch_bytes(run.config), most), enable_shard_locality=False
        ),
    )
    with _failures_explained(run), _progress(run, most, stream):
        summary = trainer.fit_or_abort().return_value
        if failure := read_failure(run.output_dir):
            raise failure
        return dict(summary)


def _with_latents(
    run: CheckedRun, world_size: int, encode: Encode, stream: TextIO, *, shared: bool = False
) -> CheckedRun:
    """The run as it will be: from cached latents, if it is to use them, which are made now if need be.

    Args:
        shared: whether the cache must lie on storage that several machines see.

    Raises:
        ConfigError: if there is a cache that does not fit; else as `prepare`.
    """
    config = run.config
    plan = run.plan(world_size, None)
    again = plan.total_updates * plan.samples_per_update > plan.num_samples
    wanted = again or config.on_bad_sample == "skip"  # who is to skip must look at all before
    if config.cache_latents == "off" or (config.cache_latents == "auto" and not wanted):
        return run
    if shared and config.latents_cache_dir is None:
        if config.cache_latents == "on" or config.on_bad_sample == "skip":
            raise ConfigError([f"--latents_cache_dir: {SEVERAL_MACHINES}"])
        stream.write(f"latents: not cached; to train faster, give --latents_cache_dir ({SEVERAL_MACHINES})\n")
        return run
    if run.random_subset:
        if config.cache_latents == "on":
            raise ConfigError([f"--max_train_samples={config.max_train_samples}: needs --seed, to cache these rows"])
        stream.write("latents: not cached, because --max_train_samples draws other rows without --seed\n")
        return run
    cache, manifest = cache_for_run(LatentPlan.of(config, run.source, run.token), encode, run.token, stream)
    run = dataclasses.replace(run, cache=cache, bad_rows=tuple(sample.row for sample in manifest.bad_samples))
    if run.start is not None and run.start.manifest.get("left_out", []) != list(run.bad_rows):
        logger.warning("%s was made with other bad samples left out: the order of samples changes", run.start.path)
    return run


def _resources_per_worker(resources: WorkerResources) -> dict[str, float]:
    return {"CPU": resources.cpus_per_worker} | ({"GPU": 1} if resources.use_gpu else {})


def _batch_bytes(config: TrainConfig) -> int:
    return config.train_batch_size * 2 * 3 * config.resolution**2


def _dataset_factory(run: CheckedRun, job: Job, loader_ref: ray.ObjectRef) -> Callable[[], ray.data.Dataset]:
    """What Ray Train calls at every start of the workers: the stream from the last committed checkpoint on."""
    batch_size = run.config.train_batch_size
    max_tasks = run.config.dataloader_num_workers * run.config.worker_range[1] or None
    fewest, most = run.config.worker_range

    def dataset() -> ray.data.Dataset:
        checkpoint = job.current_checkpoint()
        step, samples = (checkpoint.step, checkpoint.samples) if checkpoint else (0, 0)
        # How many workers an elastic run got is not known here: they stop by themselves.
        num_batches = run.plan(most, checkpoint).batches_per_worker(step) * most if fewest == most else ENDLESS
        return ray_dataset(loader_ref, batch_size, samples, num_batches, max_tasks)

    return dataset


def _announce(run: CheckedRun, world_size: int, stream: TextIO, *, use_gpu: bool) -> None:
    """Say what will be done, and write config.yaml."""
    import yaml

    settings = public_settings(run.config)
    del settings["resume_from_checkpoint"]  # the file is for doing the same again, elsewhere
    (run.output_dir / CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False))
    plan = run.plan(world_size, run.start)
    step = run.start.step if run.start else 0
    source = "" if run.cache is None else " from cached latents"
    workers = f"{world_size} worker{'s' * (world_size != 1)} on {'GPUs' if use_gpu else 'CPUs'}"
    stream.write(
        f"raycontrolnet {__version__}: {plan.num_samples} samples{source}, {workers} x batch {plan.batch_size} x "
        f"accumulation {plan.accumulation_steps}, updates {step} to {plan.total_updates}, seed {run.config.seed}\n"
    )
    changed = ", ".join(f"{name}={value}" for name, value in changed_settings(run.config).items())
    logger.info("settings: %s", changed)


def _progress(run: CheckedRun, world_size: int, stream: TextIO) -> Progress:
    total_updates = run.plan(world_size, run.start).total_updates
    return Progress(run.output_dir, total_updates, run.start.step if run.start else 0, stream)


@contextmanager
def _interruption_explained(run: CheckedRun) -> Iterator[None]:
    """Ctrl-C, wherever it comes: what stands, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"Interrupted. {_how_to_go_on(run)}") from None


@contextmanager
def _failures_explained(run: CheckedRun) -> Iterator[None]:
    """Turn whatever ends a run early into one paragraph that says what stands and how to go on."""
    try:
        yield
    except Exception as error:
        logger.exception("the run failed")
        cause = root_cause(error)
        known = read_failure(run.output_dir) or (cause if isinstance(cause, (UserError, RunError)) else None)
        message = str(known) if known else f"The run failed: {in_one_line(cause)}."
        kind = UserError if isinstance(known, UserError) else RunError
        raise kind(f"{message}\n{_how_to_go_on(run)} Details: {run.output_dir / LOG}") from error
    finally:
        end(run.output_dir)


def _how_to_go_on(run: CheckedRun) -> str:
    last = run.last_checkpoint()
    if last is None:
        return "There was no checkpoint yet."
    newest = checkpoints.latest(run.output_dir)
    if last.path.parent != run.output_dir:
        name = str(last.path)
    else:
        name = "latest" if newest and newest.path == last.path else last.path.name
    return (
        f"The checkpoint of update {last.step} stands: go on with --resume_from_checkpoint {name} "
        f"(--output_dir {run.output_dir})."
    )


def _push(run: CheckedRun, facts: dict[str, Any], stream: TextIO) -> str:
    repo_id = export.resolve_repo_id(run.output_dir, run.config.hub_model_id, run.token)
    export.write_model_card(run.output_dir, run.config, facts, repo_id=repo_id)
    url = export.push_to_hub(run.output_dir, repo_id=repo_id, token=run.token)
    stream.write(f"pushed to {url}\n")
    return url


@contextmanager
def _status_kept(output_dir: Path, started: float) -> Iterator[dict[str, Any]]:
    """run.json: status, steps, samples, seconds by phase, versions; rewritten at the start and at the end."""
    status: dict[str, Any] = {
        "status": "running",
        "started": started,
        "versions": versions(),
    }

    def write() -> None:
        partial = output_dir / f".{STATUS}.partial"
        partial.write_text(json.dumps(status | {"seconds": round(time.time() - started, 3)}, indent=1) + "\n")
        os.replace(partial, output_dir / STATUS)

    write()
    try:
        yield status
    except BaseException as error:
        if status["status"] == "running":
            status["status"] = "interrupted" if isinstance(error, Interrupted) else "failed"
            status["cause"] = str(error)
        raise
    finally:
        write()


if __name__ == "__main__":
    from raycontrolnet.cli import main

    sys.argv[1:1] = ["train"]
    sys.exit(main())
