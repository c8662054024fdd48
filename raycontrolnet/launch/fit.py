"""One training run: `fit(config) -> RunResult`.

check -> choose latents -> Ray -> encode latents -> workers (`train_controlnet`) -> run.json, model card, the Hub
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from raycontrolnet.cluster.logs import logging_to, shown_on
from raycontrolnet.cluster.nodes import gpu_types
from raycontrolnet.cluster.resources import worker_resources
from raycontrolnet.cluster.session import ray_session
from raycontrolnet.config.checks import check_device, versions, with_absolute_paths
from raycontrolnet.config.train_config import TrainConfig, changed_settings
from raycontrolnet.errors import RunError, end_told, explained_once, interruption
from raycontrolnet.hub import push
from raycontrolnet.hub.licence import Licence, find_licence
from raycontrolnet.hub.model_card import write_model_card
from raycontrolnet.launch.checked_run import CheckedRun
from raycontrolnet.launch.needs import StepSpec
from raycontrolnet.launch.needs_beside import PendingNeeds, counting
from raycontrolnet.launch.precision import trained_in, with_precision, workers_have_bf16
from raycontrolnet.launch.preflight import check, choose_latents, ensure_latents
from raycontrolnet.launch.resumed_run import how_to_go_on
from raycontrolnet.launch.workers import train_here, train_on_ray
from raycontrolnet.model.performance import has_bf16
from raycontrolnet.report.live_report import live_report
from raycontrolnet.signals import ending_signals_raised
from raycontrolnet.storage.resume import check_holds_no_sweep
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.storage.stored_folder import run_folder
from raycontrolnet.text import duration
from raycontrolnet.training import held_out, validation
from raycontrolnet.training.named_files import check_named_file
from raycontrolnet.training.run_callback import RunCallback
from raycontrolnet.training.run_log import RUN_LOG
from raycontrolnet.training.status import RunStatus, live_status
from raycontrolnet.training.store_sync import MODEL_CONFIG, final_files, run_folder_open

logger = logging.getLogger(__name__)

Summary = dict[str, Any]
"""Result of the worker loop: step, samples, loss and seconds by phase."""
Trained = tuple[CheckedRun, Summary]
"""The run as it was trained, with its precision, and the worker loop's result."""


@dataclass(frozen=True)
class RunResult:
    """Result of a finished run."""

    output_dir: Path
    """Folder of the run; this machine's part of it if it is in an object store."""
    step: int
    """Optimizer updates done, including earlier parts of the run."""
    samples: int
    """Samples consumed."""
    loss: float | None
    """Loss of the last update, the mean over workers and accumulation; None if there was nothing left to do."""
    checkpoint: Path | None
    """The last checkpoint; it may be in the object store alone."""
    seconds: float
    timings: dict[str, float]
    """Seconds by phase in the worker of rank 0."""
    uri: str | None = None
    """Folder of the run in an object store."""
    hub_url: str | None = None
    """Address of the pushed weights."""
    val_loss: float | None = None
    """Loss of the held-out rows at the last measurement; None if there are none."""
    control_gap: float | None = None
    """Growth of val_loss when the control images are shuffled."""
    control_appeared_at_step: int | None = None
    """Update since which the model obeys the control image, as far as the held-out rows show."""
    control_fidelity: float | None = None
    """Agreement of the last validation images with their control images, in [0, 1]; None if it was not measured."""


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
        Interrupted: Ctrl-C or SIGTERM; there is a checkpoint of the current update (exit code 130 or 143).
    """
    with shown_on(stream) as shown, ending_signals_raised():
        return run_fit(config, shown)


def run_fit(config: TrainConfig, stream: TextIO, callback: RunCallback | None = None) -> RunResult:
    """Train as `fit`, and tell `callback`, which may end the run, of its progress."""
    config = with_absolute_paths(config)
    folder = run_folder(config.output_dir)
    stands, handled = partial(how_to_go_on, config, folder), sys.exc_info()[1]
    try:
        with end_told(stream, stands), run_folder_open(folder):
            return _run_fit(config, folder, stream, callback)
    except KeyboardInterrupt as error:  # beside the training, which explains its own
        raise interruption(error, lambda: f"Interrupted. {stands()}", handled) from None


def _run_fit(config: TrainConfig, folder: RunFolder, stream: TextIO, callback: RunCallback | None) -> RunResult:
    started = time.time()
    check_holds_no_sweep(folder)
    run = choose_latents(check(config, folder), stream)
    check_named_file(config, folder)  # last: it warns of what the run will do
    likely = dataclasses.replace(run.config, mixed_precision=run.config.mixed_precision or trained_in(run.start))
    step = StepSpec(likely, run.token, run.cached, run.buckets.sizes if run.buckets else ())
    with counting(step, wanted=callback is None) as needs:
        return run_and_record(run, partial(_train, run, needs, stream, callback), stream, started)


def _train(
    run: CheckedRun, needs: PendingNeeds, stream: TextIO, callback: RunCallback | None, status: RunStatus
) -> Trained:
    """Train in this process or on Ray; see `run_and_record`."""
    config, schedule = run.config, run.schedule(run.start)
    if config.in_this_process:
        use_gpu = check_device(config.use_gpu, config, has_gpu=torch.cuda.is_available())
        needs.say(schedule, None, stream, use_gpu=use_gpu)
        ready = ensure_latents(run, None, stream)
        ready = with_precision(ready, use_gpu=use_gpu, has_bf16=has_bf16)
        return ready, train_here(ready, status, stream, use_gpu=use_gpu, callback=callback)
    with ray_session(config.address):
        resources = worker_resources(config)
        check_device(resources.use_gpu, config, has_gpu=resources.use_gpu)
        resources.say_what_is_awaited(stream)
        needs.say(schedule, None if resources.one_machine else gpu_types(config), stream, use_gpu=resources.use_gpu)
        ready = ensure_latents(run, resources, stream)
        asked = partial(workers_have_bf16, resources, config.wait_timeout_s, stream)
        ready = with_precision(ready, use_gpu=resources.use_gpu, has_bf16=asked)
        return ready, train_on_ray(ready, resources, status, stream, callback=callback)


def run_and_record(run: CheckedRun, train: Callable[[RunStatus], Trained], stream: TextIO, started: float) -> RunResult:
    """Train, and write what belongs beside the weights: log, report, run.json, model card.

    Args:
        train: runs the worker loop.
        started: Unix seconds.

    Raises:
        UserError, RunError, Interrupted: as `fit`.
        RunStopped: the run was ended from outside.
    """
    output_dir = run.output_dir
    with (
        logging_to(output_dir / RUN_LOG),
        live_report(output_dir),
        live_status(output_dir, started, versions()) as status,
        explained_once("The run", run.how_to_go_on, output_dir / RUN_LOG),
    ):
        run, summary = train(status)
        last = run.last_checkpoint()
        measured = held_out.summary(output_dir) | validation.summary(run.config, output_dir, summary["step"])
        status |= {**summary, **measured, "checkpoint": last.path.name if last else None}
        licence = find_licence(run.config.license, run.config, run.token)
        # Named for a push, also one by hand.
        name = push.repo_name(run.folder.shown, run.config.hub_model_id) if run.config.push_to_hub else None
        status["status"] = "finished"  # the weights stand, even if the model card cannot be written
        try:
            _write_card(run, status, name, licence)
        except OSError as error:
            logger.exception("the model card could not be written")
            status["cause"] = f"The run is finished, but its model card cannot be written ({error.strerror or error})"
            raise RunError(f"{status['cause']}: {output_dir / 'README.md'}. The weights stand.") from error
        hub_url = _push(run, status, licence, stream) if run.config.push_to_hub else None
    seconds = time.time() - started
    stream.write(f"done in {duration(seconds)}: {summary['step']} updates; weights in {run.folder.shown}\n")
    return RunResult(
        output_dir=output_dir,
        step=summary["step"],
        samples=summary["samples"],
        loss=summary["loss"],
        checkpoint=last.path if last else None,
        uri=run.folder.shown if run.folder.is_stored else None,
        seconds=seconds,
        timings=summary["timings"],
        hub_url=hub_url,
        **measured,
    )


def _write_card(run: CheckedRun, status: dict[str, Any], repo_id: str | None, licence: Licence) -> None:
    # diffusers' code in it reads a folder: a copy of what is in an object store.
    place = run.folder.name if run.folder.is_stored else run.folder.shown
    settings = changed_settings(run.config)
    run.folder.pull(MODEL_CONFIG)  # of which the card's code depends
    write_model_card(run.output_dir, settings, status, repo_id=repo_id, licence=licence, place=place)


def _push(run: CheckedRun, status: dict[str, Any], licence: Licence, stream: TextIO) -> str:
    """Push the results; if that fails, the run is finished all the same, and `status` says so."""
    try:
        single_file = run.config.single_file
        repo_id = push.resolve_repo_id(run.folder.shown, run.config.hub_model_id, run.token, single_file)
        _write_card(run, status, repo_id, licence)
        run.folder.pull(*final_files(run.config))
        url = push.push_to_hub(run.output_dir, repo_id=repo_id, token=run.token, single_file=single_file)
    except RunError as error:
        status["push_failure"] = str(error)
        raise
    status["pushed_to"] = url
    if not licence.ids:
        stream.write("licence: none is known for the base model, so the model card names none; --license names one\n")
    stream.write(f"pushed to {url}\n")
    return url
