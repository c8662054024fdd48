"""A trial of Ray Tune: one run of `fit` that reports its validations to Tune.

    tuner = tune.Tuner(
        trainable(TrainConfig(...)),
        param_space={"learning_rate": tune.loguniform(1e-6, 1e-4)},
        tune_config=tune.TuneConfig(metric="val_loss", mode="min", num_samples=8, scheduler=..., search_alg=...),
    )
    best = tuner.fit().get_best_result()
    ControlNetModel.from_pretrained(checkpoint_folder(best.checkpoint) / "controlnet")

`sweep` builds its trials from the same `TuneCallback` and `trial_function`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune

from raycontrolnet.cluster.environment import passed_on
from raycontrolnet.cluster.nodes import cluster_nodes, total
from raycontrolnet.cluster.tuning import ends_orderly, pass_to_trials
from raycontrolnet.config.checks import with_absolute_paths
from raycontrolnet.config.cluster_settings import ClusterConfig
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.config.values import setting_types, unknown_names
from raycontrolnet.errors import ConfigError, UserError
from raycontrolnet.launch.fit import run_fit
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.storage.resume import checkpoint_at
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.storage.stored_folder import DRIVER, folder_containing, run_folder
from raycontrolnet.storage.uri import is_uri, shown_uri
from raycontrolnet.training.run_callback import RunStopped
from raycontrolnet.tune.concurrency import TrialSlots
from raycontrolnet.tune.records import Report, read_reports

logger = logging.getLogger(__name__)

CHECKPOINT_FILE = "raycontrolnet.json"
"""The one file of a Tune checkpoint: names the checkpoint folder of the run."""
ASK_INTERVAL_S = 0.5
"""Seconds between two looks at whether a trial goes on."""
NOT_FOR_TRIALS = {
    "output_dir": "every trial has a folder of its own in that of the TrainConfig",
    "resume_from_checkpoint": "a trial that Tune restores continues from its own checkpoint",
    "hub_token": "Tune would write it to its files; set HF_TOKEN where Ray runs",
    "push_to_hub": "trials would overwrite each other; push the best by hand",
}
"""Settings that a trial does not take, and why."""


def trainable(train_config: TrainConfig) -> Callable[[dict[str, Any]], None]:
    """Return a trial for `ray.tune.Tuner`, with any scheduler and search algorithm.

    `param_space` may name any setting of `TrainConfig` but those that give each trial its place. Every validation is
    reported with the measures of `validation.jsonl`, `loss` and `step`, and with a checkpoint for `checkpoint_folder`
    once the run has written one. A trial trains as `fit` does, in `<output_dir>/<Tune's trial id>`: with one worker in
    the trial's own process, with several on Ray Train (then set `max_concurrent_trials`, so that trials do not wait
    for each other's workers). Trials get CPUs and a GPU as `fit` would; `tune.with_resources` sets others.

    A trial that Tune restores (after a failure, or for population based training) continues from the checkpoint that
    it is given. With `checkpointing_steps` equal to `validation_steps` nothing is trained twice. With an `output_dir`
    in an object store trials need no disk in common.

    Args:
        train_config: settings that all trials share. Without a seed they share a random one.

    Raises:
        ConfigError: the settings are not for trials.
    """
    given = [name for name in NOT_FOR_TRIALS if getattr(train_config, name) and name != "output_dir"]
    if given:
        raise ConfigError([f"--{name}: {NOT_FOR_TRIALS[name]}" for name in given])
    shared = with_absolute_paths(train_config)
    if shared.seed is None:
        shared = dataclasses.replace(shared, seed=secrets.randbelow(2**31))

    def trial(config: dict[str, Any]) -> None:
        folder = run_folder(shared.output_dir).child(tune.get_context().get_trial_id(), DRIVER)
        train = _with_settings(shared, config, folder)
        named = train.resume_from_checkpoint
        start = checkpoint_at(named, folder) if named and named != "latest" else None
        callback = TuneCallback(folder, train.validation_steps, start)
        try:
            with Path(os.devnull).open("w") as nowhere:
                run_fit(train, nowhere, callback)
            callback.report(callback.last_report())
        finally:
            folder.clear(start.uri if start else None)

    return tune.with_resources(trial_function(trial), _resources(shared))


def checkpoint_folder(checkpoint: tune.Checkpoint) -> Path:
    """Return the folder `checkpoint-N` that a trial's Tune checkpoint names; the weights are in its `controlnet/`.

    One in an object store is fetched.

    Raises:
        UserError: another trainable wrote the checkpoint, or it is gone from the object store.
    """
    place = _place(checkpoint)
    return _fetched(place) if is_uri(place) else Path(place)


def _place(checkpoint: tune.Checkpoint) -> str:
    """Return the path or URI of the folder `checkpoint-N` that a trial's Tune checkpoint names; it may be gone.

    Raises:
        UserError: another trainable wrote the checkpoint.
    """
    with checkpoint.as_directory() as directory:
        file = Path(directory) / CHECKPOINT_FILE
        if not file.is_file():
            raise UserError(f"{checkpoint.path}: has no {file.name}, so no trial of raycontrolnet wrote it")
        return str(json.loads(file.read_text())["folder"])


def _fetched(uri: str) -> Path:
    """Return a folder of this machine with the checkpoint that `uri` names."""
    folder, inner = folder_containing(uri, "tune")
    found = next((each for each in folder.checkpoints() if each.path.name == inner.rstrip("/")), None)
    if found is None:
        raise UserError(f"{shown_uri(uri)}: this checkpoint is gone")
    return folder.sound(found).path


class TuneCallback:
    """Reports a run's validations to Tune, and ends the run when Tune stops the trial."""

    def __init__(
        self,
        folder: RunFolder,
        validation_steps: int,
        start: checkpoints.Checkpoint | None = None,
        *,
        goes_on: Callable[[], bool] = lambda: True,
        sent: Sequence[str] = (),
    ):
        """Begin with the run.

        Args:
            folder: the run's.
            start: checkpoint that the run starts from, if it is not the last one in `folder`.
            goes_on: called now and then; the run ends once it returns False.
            sent: files that are sent to an object store before a report, for who gets it reads them there.
        """
        self._folder, self._validation_steps = folder, validation_steps
        self._goes_on, self._asked_at, self._sent = goes_on, 0.0, sent
        self._start = start
        self._earlier = {checkpoint.run_id for checkpoint in folder.checkpoints()}
        self.stopped = False
        """True once Tune has stopped the trial; it takes no report after that."""

    def updated(self) -> None:
        """Ask now and then whether the run goes on; Tune itself stops a trial at a report.

        Raises:
            RunStopped: it does not.
        """
        now = time.monotonic()
        if now - self._asked_at >= ASK_INTERVAL_S:
            self._asked_at = now
            if not self._goes_on():
                raise RunStopped

    def validated(self, step: int) -> None:
        self.updated()
        self.report(self.last_report(step))
        self.updated()

    def last_report(self, until: int | None = None) -> Report:
        """Return the measures of the last validation, or of the last until an update; empty before the first."""
        reports = read_reports(self._folder.path, self._validation_steps)
        return next((each for each in reversed(reports) if until is None or each["step"] <= until), {})

    def report(self, figures: Mapping[str, Any], *, with_checkpoint: bool = True) -> None:
        """Report to Tune, and wait for its decision.

        Raises:
            RunStopped: Tune stops the trial.
        """
        last = self._checkpoint(figures.get("step")) if with_checkpoint else None
        try:
            self._folder.push(*self._sent, tries=2)
        except OSError as error:  # they are sent again later
            logger.warning("the records of %s: %s", self._folder.shown, error)
        try:
            if last is None:
                tune.report(dict(figures))
                return
            with tempfile.TemporaryDirectory() as directory:
                content = {"folder": self._folder.place_of(last), "step": last.step}
                (Path(directory) / CHECKPOINT_FILE).write_text(json.dumps(content) + "\n")
                tune.report(dict(figures), checkpoint=tune.Checkpoint.from_directory(directory))
        except SystemExit:  # Tune's way to end the thread that reports, which may not be the one that trains
            self.stopped = True
            raise RunStopped from None

    def _checkpoint(self, step: int | None) -> checkpoints.Checkpoint | None:
        """Return the checkpoint with the weights nearest to `step`: this run's last, or else the one it started from.

        Population based training may have gone back, or to another trial's checkpoint: others in the folder are void.
        """
        found = [each for each in self._folder.checkpoints() if step is None or each.step <= step]
        own = [each for each in found if each.run_id not in self._earlier]
        candidates = own or ([self._start] if self._start else found)
        return candidates[-1] if candidates else None


def trial_function(run: Callable[..., None]) -> Callable[..., None]:
    """Return `run` as a function trainable that Tune can stop at a report.

    Args:
        run: takes Tune's `config` and what `tune.with_parameters` adds; raises `RunStopped` once it is stopped.
    """

    def trial(config: dict[str, Any], **parameters: Any) -> None:
        try:
            run(config, **parameters)
        except RunStopped:
            sys.exit(0)  # a return would report once more

    pass_to_trials(passed_on())  # nothing else does so on a Ray that the user has connected
    return ends_orderly(trial)


def _with_settings(train: TrainConfig, config: Mapping[str, Any], folder: RunFolder) -> TrainConfig:
    """Return `train` with the settings of a trial.

    Raises:
        ConfigError: unknown settings, or values that do not fit.
    """
    problems = unknown_names(config, setting_types(TrainConfig), "param_space")
    problems += [f"param_space: {name}: {why}" for name, why in NOT_FOR_TRIALS.items() if name in config]
    if problems:
        raise ConfigError(problems)
    # Some of Tune's domains draw numbers of numpy.
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in config.items()}
    restored = tune.get_checkpoint()
    start = _start(folder, _place(restored) if restored else None)
    train = dataclasses.replace(train, **plain, output_dir=folder.place, resume_from_checkpoint=start)
    if train.worker_range[1] > 1:
        return train
    use_gpu = bool(ray.get_gpu_ids()) if train.use_gpu is None else train.use_gpu
    return dataclasses.replace(train, num_workers="0", use_gpu=use_gpu)


def _start(folder: RunFolder, restored: str | None) -> str | None:
    """Return the checkpoint to continue from: `restored` by Tune, or the last that the trial wrote in `folder`.

    Args:
        folder: the trial's.
        restored: a path or URI.

    Raises:
        UserError: `restored` is another trial's, and gone.
    """
    if restored and checkpoint_at(restored, folder):
        return restored
    if restored and not restored.startswith(f"{folder.place.partition('?')[0]}/"):
        raise UserError(
            f"{shown_uri(restored)}: Tune continues from this checkpoint of another trial, and it is gone; keep more "
            "with a higher --checkpoints_total_limit, or leave that out"
        )
    return "latest" if folder.latest() else None


def _resources(cluster: ClusterConfig) -> Callable[[dict[str, Any]], tune.PlacementGroupFactory]:
    """Return the resources of a trial's process, which Tune asks for once Ray is connected."""

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        use_gpu = cluster.use_gpu
        if use_gpu is None:
            nodes = cluster_nodes(cluster)
            use_gpu = total("GPU", (*nodes.nodes, *(nodes.may_come or ()))) > 0
        workers = cluster.most_workers
        slot = TrialSlots(
            1, workers, cluster.cpus_per_worker or 1.0, float(use_gpu), cluster.accelerator_type, reason=""
        )
        return tune.PlacementGroupFactory([slot.resources()])

    return resources
