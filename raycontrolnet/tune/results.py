"""Results of a whole sweep: leaderboard.csv, best/, TensorBoard's hparams, the push of the best."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raycontrolnet.config.checks import find_token, versions
from raycontrolnet.config.train_config import changed_settings, public_settings
from raycontrolnet.hub import model_card, push
from raycontrolnet.hub.licence import find_licence
from raycontrolnet.sampling import images
from raycontrolnet.sampling.find_controlnet import CONFIG_FILE
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.storage.files import replacing_folder
from raycontrolnet.training import validation
from raycontrolnet.training.final_weights import copy_weights
from raycontrolnet.training.store_sync import final_files
from raycontrolnet.tune.hparams import write_hparams
from raycontrolnet.tune.leaderboard import write_leaderboard
from raycontrolnet.tune.plan import SweepPlan
from raycontrolnet.tune.records import Report, Trial, control_appeared, ranked, read_trials, run_folder_of

logger = logging.getLogger(__name__)

BEST_FOLDER = "best"
LEFT_OUT_OF_BEST = ("output_dir", "resume_from_checkpoint", "tracker_group")
"""Settings that config.yaml in best/ leaves out, for the next run has its own."""


def ranked_trials(plan: SweepPlan) -> list[Trial]:
    """Return all trials so far, the best first."""
    return ranked(read_trials(plan.sweep_dir, plan.train.validation_steps), plan.config.objective)


def write_results(plan: SweepPlan, trials: Sequence[Trial], facts: dict[str, Any]) -> None:
    """Write leaderboard.csv, best/ and TensorBoard's hparams.

    Args:
        trials: the best first.
        facts: content of sweep.json; gets the name of the best trial.
    """
    objective, train = plan.config.objective, plan.train
    write_leaderboard(plan.sweep_dir, trials, objective, plan.folder)
    best = next((trial for trial in trials if weights_of(plan, trial)), None)
    facts["best"] = best.record.name if best else None
    if best:
        write_best(plan, best, facts)
        plan.folder.mirror(f"{BEST_FOLDER}/*")
    if "tensorboard" in train.trackers:
        try:
            for trial in trials:
                write_hparams(plan.sweep_dir / train.logging_dir, trial, objective)
            plan.folder.mirror(train.logging_pattern)
        except OSError:  # the trials' own files have all of it
            logger.warning("TensorBoard's files could not be written", exc_info=True)


def push_best(plan: SweepPlan, best: Trial, facts: Mapping[str, Any]) -> str:
    """Push best/, whose model card then names the repository.

    Args:
        facts: content of sweep.json.

    Raises:
        RunError: the push failed; the sweep is finished all the same.
    """
    token, single_file = plan.run.token, plan.train.single_file
    repo_id = push.resolve_repo_id(plan.folder.shown, plan.train.hub_model_id, token, single_file)
    folder = write_best(plan, best, facts, repo_id)
    try:
        plan.folder.mirror(f"{BEST_FOLDER}/*")
    except OSError as error:
        logger.warning("%s: the model card there does not name the repository (%s)", plan.folder.shown, error)
    return push.push_to_hub(folder, repo_id=repo_id, token=token, single_file=single_file)


def weights_of(plan: SweepPlan, trial: Trial) -> tuple[Path, Report] | None:
    """Return the folder with a trial's weights, final or of its last checkpoint, and the last report up to them.

    Weights in an object store are fetched.

    Returns:
        None if there are no weights yet.
    """
    folder = run_folder_of(plan.folder, trial.record)
    if trial.record.state == "finished":
        folder.pull(*final_files(plan.train))
        if _has_weights(folder.path):
            return folder.path, trial.last
    last = folder.latest_sound() if folder.is_stored else folder.latest()
    if last and _has_weights(weights := last.path / checkpoints.CONTROLNET_FOLDER):
        reports = [report for report in trial.reports if report["step"] <= last.step]
        return weights, reports[-1] if reports else {}
    return None


def _has_weights(folder: Path) -> bool:
    return all((folder / name).is_file() for name in push.WEIGHTS)


def write_best(plan: SweepPlan, trial: Trial, sweep_facts: Mapping[str, Any], repo_id: str | None = None) -> Path:
    """Replace best/ by the weights, settings and model card of `trial`, which has weights, and return its path.

    Args:
        sweep_facts: content of sweep.json.
        repo_id: the repository to which best/ will be pushed.
    """
    import yaml

    found = weights_of(plan, trial)
    assert found is not None
    weights, figures = found
    best, step = plan.sweep_dir / BEST_FOLDER, int(figures.get("step", 0))
    config = plan.config_of(trial.record, sweep_facts["mixed_precision"])
    with replacing_folder(best) as new:
        try:
            copy_weights(weights, new, config)
        except OverflowError as error:  # all the work is done
            logger.warning("--save_precision=%s: %s; %s/ has bf16 instead", config.save_precision, error, BEST_FOLDER)
            config = dataclasses.replace(config, save_precision="bf16")
            copy_weights(weights, new, config)
        settings = {name: value for name, value in public_settings(config).items() if name not in LEFT_OUT_OF_BEST}
        file = CONFIG_FILE if plan.folder.is_stored else best / CONFIG_FILE
        head = (
            f"# Settings of trial {trial.record.name}, the best of a sweep. To train anew with them:\n"
            f"#   raycontrolnet train --config {file} --output_dir FOLDER\n"
        )
        (new / CONFIG_FILE).write_text(head + yaml.safe_dump(settings, sort_keys=False))
        if drawn := validation.finished_folders(trial.folder, step):
            shutil.copytree(drawn[-1], validation.step_folder(new, images.results(drawn[-1])[0].step))
    facts: dict[str, Any] = {**figures, "versions": versions()}
    if "control_gap" in figures:
        facts["control_appeared_at_step"] = control_appeared([one for one in trial.reports if one["step"] <= step])
    licence = find_licence(config.license, config, find_token(config.hub_token))
    shown, title, place = changed_settings(config), plan.folder.name, f"{plan.folder.shown}/{BEST_FOLDER}"
    model_card.write_model_card(best, shown, facts, repo_id=repo_id, title=title, licence=licence, place=place)
    return best
