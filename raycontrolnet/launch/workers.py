"""Start of the worker loop for one run: in this process, or by a Ray Train `TorchTrainer` on the connected Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TextIO

from raycontrolnet.cluster.resources import WorkerResources
from raycontrolnet.data.stream import execution_options
from raycontrolnet.errors import explained
from raycontrolnet.launch.announce import announce
from raycontrolnet.launch.checked_run import CheckedRun
from raycontrolnet.launch.training_stream import TrainingStream
from raycontrolnet.launch.waiting import waiting_for_workers
from raycontrolnet.report.progress import Progress, progress
from raycontrolnet.signals import ended_in_order
from raycontrolnet.training import held_out, metrics, validation
from raycontrolnet.training.background import repeating
from raycontrolnet.training.failures import read_failure, read_hang
from raycontrolnet.training.host_memory import variables_for_kept_memory
from raycontrolnet.training.job import RUN_LOG, Job, RunCallback, RunStopped, ask_to_stop, begin, end
from raycontrolnet.training.saver import writes_finished
from raycontrolnet.training.schedule import due_steps
from raycontrolnet.training.status import RunStatus
from raycontrolnet.training.store_sync import DRIVERS, aborted_if_lost, records_fetched
from raycontrolnet.training.watchdog import collective_timeout_s

if TYPE_CHECKING:
    import ray
    import ray.train

logger = logging.getLogger(__name__)

FOLLOW_INTERVAL_S = 1.0
GRACE_S = 15.0
"""Time to write a checkpoint after SIGTERM: Slurm and Kubernetes kill a process after 30 s, and the end takes some."""


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
    with _running(run, job, status, stream, callback):
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
    options = execution_options(loader.batch_bytes, most)
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
        dataset_config=DataOfWorkers(training_stream, options),
    )
    trainer.folder = run.folder
    trainer.one_machine = resources.one_machine
    trainer.worker_timeout_s = run.config.hang_timeout_s
    trainer.finished = writes_finished
    with _running(run, job, status, stream, callback):
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
        worker_runtime_env={"env_vars": variables_for_kept_memory()} if on_cpu else None,
    )


@contextmanager
def _running(
    run: CheckedRun, job: Job, status: RunStatus, stream: TextIO, callback: RunCallback | None
) -> Iterator[None]:
    """Begin the run, and show its progress unless there is a callback.

    An early end is explained by the failure that a worker recorded, or else by Ray's error.
    """
    total_updates, step = run.schedule(run.start).total_updates, run.start.step if run.start else 0
    config = run.config
    validates = config.num_held_out(len(run.source)) or config.validation_pairs
    shown = (
        nullcontext()
        if callback
        else progress(
            Progress(
                run.output_dir,
                total_updates,
                step,
                stream,
                scored=config.control_fidelity is not None,
                validation_steps=config.validation_steps if validates else None,
                num_images=len(job.validation_items),
            )
        )
    )
    begin(run.folder, job)
    run.folder.push(*DRIVERS)
    begun = time.time()

    def begin_end() -> bool:
        try:
            if (run.output_dir / metrics.METRICS_FILE).stat().st_mtime < begun:  # no worker trains yet
                return False
            ask_to_stop(run.folder)
        except OSError:
            return False
        with suppress(OSError, ValueError, RuntimeError):  # a closed terminal, or one that is being written to
            stream.write("\nending with a checkpoint of the current update; Ctrl-C again to end at once\n")
        return True

    def last_words() -> None:
        with suppress(OSError, ValueError, RuntimeError):
            status.interrupted()
            # Without asking an object store, which may not answer.
            last = "Go on with --resume_from_checkpoint latest." if run.folder.is_stored else run.how_to_go_on()
            stream.write(f"\nInterrupted. {last}\n")
            stream.flush()

    with explained("The run", run.how_to_go_on, run.output_dir / RUN_LOG, unchanged=()):
        try:
            with ended_in_order(begin_end, GRACE_S, last_words), shown:
                yield
        except Exception as error:
            if failure := read_failure(run.output_dir) or read_hang(run.output_dir):
                raise failure from error
            raise
        finally:
            end(run.folder)


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
