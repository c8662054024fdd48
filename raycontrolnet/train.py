"""The driver of one training run: `fit(config) -> RunResult`.

Checks everything that can be checked before anything is loaded, hands a `Job` to the workers of a Ray Train
`TorchTrainer`, shows the progress, and finishes what they left: model card, run.json, the Hub.
`python -m raycontrolnet.train ARGS` is `raycontrolnet train ARGS`.
"""

from __future__ import annotations

import logging
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
from raycontrolnet.data.bundles import StreamPlan
from raycontrolnet.data.stream import execution_options, ray_dataset
from raycontrolnet.ending import failures_explained, interruption_explained
from raycontrolnet.errors import RunError
from raycontrolnet.latents_of_run import WantedLatents, planned_latents, with_latents
from raycontrolnet.preflight import CheckedRun, check, check_device, versions, with_absolute_paths
from raycontrolnet.prepare_latents import here, on_ray
from raycontrolnet.run import export, held_out, validation
from raycontrolnet.run.failures import read_failure
from raycontrolnet.run.job import LOG, Job, begin
from raycontrolnet.run.live_report import report_kept
from raycontrolnet.run.progress import Progress, duration
from raycontrolnet.run.status import RunStatus, status_kept
from raycontrolnet.run.trained import CONFIG

if TYPE_CHECKING:
    import ray

logger = logging.getLogger(__name__)

ENDLESS = 2**40


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
    val_loss: float | None = None
    """Of the rows that are held out, at the last measurement; None if there are none."""
    control_gap: float | None = None
    """By how much val_loss grows when the control images are shuffled."""
    control_appeared_at_step: int | None = None
    """Since when the model obeys the control image, as far as the held-out rows show."""
    control_fidelity: float | None = None
    """How well the last validation images obey their control images, in [0, 1]; None if it was not measured."""


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
    latents = planned_latents(run, stream)
    with (
        logging_to(output_dir / LOG),
        report_kept(output_dir),
        status_kept(output_dir, started, versions()) as status,
        interruption_explained(run),
    ):
        if config.worker_range == (0, 0):
            summary = _train_here(run, latents, status, stream)
        else:
            with ray_session(config.address):
                summary = _train_on_ray(run, latents, status, stream)
        last = run.last_checkpoint()
        measured = held_out.summary(output_dir) | validation.summary(run.config, output_dir, summary["step"])
        status |= {**summary, **measured, "checkpoint": last.path.name if last else None}
        licence = export.find_licence(run.config, run.token)
        # Fit to be pushed, also by hand: if the Hub does not even say who the owner is, there is no better name.
        name = export.repo_name(output_dir, config.hub_model_id) if config.push_to_hub else None
        with _finished_all_the_same(output_dir, status):
            export.write_model_card(output_dir, run.config, status, repo_id=name, licence=licence)
        hub_url = _push(run, status, licence, stream) if config.push_to_hub else None
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
        **measured,
    )


@contextmanager
def _finished_all_the_same(output_dir: Path, status: RunStatus) -> Iterator[None]:
    """The weights are there: what comes after them may fail, and the run is finished."""
    status["status"] = "finished"
    try:
        yield
    except OSError as error:
        logger.exception("the model card could not be written")
        status["cause"] = f"The run is finished, but its model card cannot be written ({error.strerror or error})"
        raise RunError(f"{status['cause']}: {output_dir / 'README.md'}. The weights stand.") from error


def _train_here(run: CheckedRun, latents: WantedLatents | None, status: RunStatus, stream: TextIO) -> dict[str, Any]:
    """The worker loop in this process: Ray Train's local mode, for debugging and quick tests."""
    import torch
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from raycontrolnet.train_controlnet import train_controlnet

    use_gpu = torch.cuda.is_available() if run.config.use_gpu is None else run.config.use_gpu
    check_device(run.config, use_gpu=use_gpu, has_gpu=torch.cuda.is_available())
    run = with_latents(run, latents, here(run.config), stream)
    job = run.job(use_gpu=use_gpu, threads=None, loader=run.loader)
    _announce(run, 1, status, stream, use_gpu=use_gpu)
    begin(job)
    trainer = TorchTrainer(
        train_controlnet,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=0),
        run_config=RunConfig(storage_path=str(run.output_dir.parent), name=run.output_dir.name),
    )
    with failures_explained(run), _progress(run, 1, stream):
        return dict(trainer.fit().return_value)


def _train_on_ray(run: CheckedRun, latents: WantedLatents | None, status: RunStatus, stream: TextIO) -> dict[str, Any]:
    import ray
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig

    from raycontrolnet.train_controlnet import train_controlnet

    resources = worker_resources(run.config)
    check_device(run.config, use_gpu=resources.use_gpu, has_gpu=resources.use_gpu)
    fewest, most = resources.num_workers
    run = with_latents(run, latents, on_ray(resources), stream, shared=not resources.one_machine)
    loader_ref = ray.put(run.loader)
    threads = None if resources.use_gpu else resources.threads
    spare = _options_for(resources) if resources.spare and run.config.validation_pairs else None
    job = run.job(use_gpu=resources.use_gpu, threads=threads, loader=loader_ref, spare=spare)
    _announce(run, most, status, stream, use_gpu=resources.use_gpu)
    if resources.waits_for:
        stream.write(f"waiting for {resources.waits_for}\n")
    begin(job)
    with failures_explained(run):
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
            datasets={"train": _dataset_factory(run, job)},
            dataset_config=DataConfig(
                execution_options=execution_options(_batch_bytes(run.config), most), enable_shard_locality=False
            ),
        )
        with _progress(run, most, stream):
            summary = trainer.fit_or_abort().return_value
        if failure := read_failure(run.output_dir):
            raise failure
        return dict(summary)


def _options_for(resources: WorkerResources) -> dict[str, Any]:
    """Ray's options for an actor with the resources of a worker."""
    of_gpu = {"num_gpus": 1, "accelerator_type": resources.accelerator_type} if resources.use_gpu else {}
    return {"num_cpus": resources.cpus_per_worker, **of_gpu}


def _resources_per_worker(resources: WorkerResources) -> dict[str, float]:
    return {"CPU": resources.cpus_per_worker} | ({"GPU": 1} if resources.use_gpu else {})


def _batch_bytes(config: TrainConfig) -> int:
    return config.train_batch_size * 2 * 3 * config.resolution**2


def _dataset_factory(run: CheckedRun, job: Job) -> Callable[[], ray.data.Dataset]:
    """What Ray Train calls at every start of the workers: the stream from the last committed checkpoint on."""
    batch_size, bundle = run.config.train_batch_size, StreamPlan.bundle_for(_batch_bytes(run.config))
    max_tasks = run.config.dataloader_num_workers * run.config.worker_range[1] or None
    fewest, most = run.config.worker_range

    def dataset() -> ray.data.Dataset:
        checkpoint = job.current_checkpoint()
        step, samples = (checkpoint.step, checkpoint.samples) if checkpoint else (0, 0)
        if fewest == most:
            plan = StreamPlan(samples, run.plan(most, checkpoint).batches_per_worker(step), batch_size, most, bundle)
        else:  # how many workers an elastic run got is not known here: they stop by themselves
            plan = StreamPlan(samples, ENDLESS, batch_size)
        return ray_dataset(job.loader, plan, max_tasks)

    return dataset


def _announce(run: CheckedRun, world_size: int, status: RunStatus, stream: TextIO, *, use_gpu: bool) -> None:
    """Say what will be done, and write config.yaml."""
    import yaml

    settings = public_settings(run.config)
    del settings["resume_from_checkpoint"]  # the file is for doing the same again, elsewhere
    (run.output_dir / CONFIG).write_text(yaml.safe_dump(settings, sort_keys=False))
    plan = run.plan(world_size, run.start)
    status |= {"total_updates": plan.total_updates, "held_out": len(run.loader.order.held_out)}
    status.write()
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
    scored = run.config.control_fidelity is not None
    return Progress(run.output_dir, total_updates, run.start.step if run.start else 0, stream, scored=scored)


def _push(run: CheckedRun, status: dict[str, Any], licence: export.Licence, stream: TextIO) -> str:
    """Push what the run left; a push that fails is no failed run, and `status` says so."""
    try:
        repo_id = export.resolve_repo_id(run.output_dir, run.config.hub_model_id, run.token)
        export.write_model_card(run.output_dir, run.config, status, repo_id=repo_id, licence=licence)
        url = export.push_to_hub(run.output_dir, repo_id=repo_id, token=run.token)
    except RunError as error:
        status["push_failure"] = str(error)
        raise
    status["pushed_to"] = url
    stream.write(f"pushed to {url}\n")
    return url


if __name__ == "__main__":
    from raycontrolnet.cli import main

    sys.argv[1:1] = ["train"]
    sys.exit(main())
