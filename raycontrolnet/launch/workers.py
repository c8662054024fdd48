"""Start of the worker loop for one run: in this process, or by a Ray Train `TorchTrainer` on the connected Ray."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from raycontrolnet.cluster.resources import WorkerResources
from raycontrolnet.data.stream import execution_options
from raycontrolnet.launch.announce import announce
from raycontrolnet.launch.checked_run import CheckedRun
from raycontrolnet.launch.running import running
from raycontrolnet.launch.training_stream import TrainingStream
from raycontrolnet.launch.waiting import waiting_for_workers
from raycontrolnet.training import held_out, metrics, validation
from raycontrolnet.training.background import repeating
from raycontrolnet.training.failures import read_failure
from raycontrolnet.training.host_memory import variables_of_workers
from raycontrolnet.training.run_callback import RunCallback, RunStopped
from raycontrolnet.training.saver import writes_finished
from raycontrolnet.training.schedule import due_steps
from raycontrolnet.training.status import RunStatus
from raycontrolnet.training.store_sync import aborted_if_lost, records_fetched
from raycontrolnet.training.watchdog import collective_timeout_s

if TYPE_CHECKING:
    import ray
    import ray.train

logger = logging.getLogger(__name__)

FOLLOW_INTERVAL_S = 1.0
ANSWER_S = 5.0
"""Time for Ray to answer some time after SIGTERM; it does not if its processes got the signal as well."""


def train_here(
    run: CheckedRun,
    status: RunStatus,
    stream: TextIO,
    *,
    use_gpu: bool,
    threads: int | None = None,
    callback: RunCallback | None = None,
) -> dict[str, Any]:
    """Run the worker loop in this process, without Ray Train: for debugging, tests, and trials of one worker.

    Args:
        threads: CPU threads; None leaves them.

    Returns:
        What the worker loop returns.
    """
    from raycontrolnet.train_controlnet import train_controlnet

    job = run.job(use_gpu=use_gpu, threads=threads, loader=run.loader, callback=callback)
    announce(run, status, stream, use_gpu=use_gpu)
    with running(run, job, status, stream, callback, lambda: True):
        summary = train_controlnet({"job": job})
    assert summary is not None
    return summary


def train_on_ray(
    run: CheckedRun,
    resources: WorkerResources,
    status: RunStatus,
    stream: TextIO,
    *,
    callback: RunCallback | None = None,
) -> dict[str, Any]:
    """Run the worker loop on workers of the connected Ray.

    Returns:
        What the worker loop of rank 0 returns.
    """
    import ray
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig

    from raycontrolnet.cluster.data_of_workers import DataOfWorkers, nothing_yet
    from raycontrolnet.cluster.trainer import InterruptibleTrainer
    from raycontrolnet.train_controlnet import train_controlnet

    fewest, most = resources.num_workers
    loader = run.loader
    loader_ref = ray.put(loader)
    threads = None if resources.use_gpu else resources.threads
    # A sweep's trials share the cluster: what looks spare may be another trial's.
    has_spare = resources.spare and callback is None
    actor_options = resources.actor_options if has_spare and run.config.validation_pairs else None
    job = run.job(use_gpu=resources.use_gpu, threads=threads, loader=loader_ref, actor_options=actor_options)
    announce(run, status, stream, use_gpu=resources.use_gpu)
    training_stream = TrainingStream(
        job.config, job.folder, job.run_id, job.start, job.num_samples, loader_ref, loader.batch_bytes
    )
    trainer = InterruptibleTrainer(
        train_controlnet,
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=collective_timeout_s(run.config.hang_timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=resources.use_gpu,
            resources_per_worker=resources.per_worker,
            accelerator_type=resources.accelerator_type,
        ),
        run_config=_run_config(run, on_cpu=not resources.use_gpu),
        datasets={"train": nothing_yet},
        dataset_config=DataOfWorkers(training_stream, execution_options(loader.batch_bytes, most)),
    )
    trainer.folder = run.folder
    trainer.one_machine = resources.one_machine
    trainer.worker_timeout_s = run.config.hang_timeout_s
    trainer.finished = writes_finished
    with running(run, job, status, stream, callback, partial(trainer.answers, ANSWER_S)):
        limit_s = run.config.wait_timeout_s
        waiting = waiting_for_workers(trainer.is_waiting, trainer.abort, resources, limit_s, stream)
        lost = aborted_if_lost(run.folder, trainer.abort)
        with records_fetched(run.folder), _followed(run, trainer, callback), waiting, lost:
            summary = trainer.fit_or_abort(run.config.max_failures).return_value
        if failure := read_failure(run.output_dir):
            raise failure
    return dict(summary)


def _run_config(run: CheckedRun, *, on_cpu: bool) -> ray.train.RunConfig:
    """Return the run's place and patience and its workers' environment, as Ray Train takes them."""
    from ray.train import FailureConfig, RunConfig

    config = run.config
    failures = FailureConfig(max_failures=config.max_failures, max_preemption_failures=config.max_preemption_failures)
    return RunConfig(
        storage_path=run.folder.parent,
        name=run.folder.name,
        failure_config=failures,
        worker_runtime_env={"env_vars": variables_of_workers()} if on_cpu else None,
    )


@contextmanager
def _followed(run: CheckedRun, trainer: Any, callback: RunCallback | None) -> Iterator[None]:
    """Report to `callback` what the workers' files say; when it ends the run, stop the workers, raise `RunStopped`."""
    if callback is None:
        yield
        return
    stopped = False
    start = run.start.step if run.start else 0
    told = {step for step in _validated(run) if step <= start}

    def look() -> None:
        nonlocal stopped
        try:
            if stopped:  # and again: there may have been no workers yet
                trainer.abort()
                return
            callback.updated()
            for step in sorted(_validated(run) - told):
                if not _checkpoint_is_there(run, step):
                    break
                told.add(step)
                callback.validated(step)
        except RunStopped:
            stopped = True
        except Exception:
            logger.warning("the run could not be followed", exc_info=True)

    try:
        with repeating(look, FOLLOW_INTERVAL_S, "callback"):
            yield
    except Exception as error:
        if stopped:
            raise RunStopped from error
        raise


def _validated(run: CheckedRun) -> set[int]:
    """Return the updates whose validation is complete, without the last update."""
    updates = metrics.read(run.output_dir / metrics.METRICS_FILE)
    total_updates = run.schedule(run.start).total_updates
    done = min(updates[-1]["step"] if updates else 0, total_updates - 1)
    steps = set(due_steps(run.config.validation_steps, done, total_updates))
    if run.config.num_held_out(len(run.source)):
        steps &= {record["step"] for record in held_out.read(run.output_dir)}
    if run.config.control_fidelity:
        steps &= set(validation.fidelity_by_step(run.output_dir, done))
    return steps


def _checkpoint_is_there(run: CheckedRun, step: int) -> bool:
    """Check whether the checkpoint of update `step`, written beside the training, is whole; True if none is due."""
    if step not in due_steps(run.config.checkpointing_steps, step, run.schedule(run.start).total_updates):
        return True
    last = run.folder.latest(run.run_id)
    return last is not None and last.step >= step
