"""best/: the best trial's weights as diffusers loads them, its settings, its model card."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from raycontrolnet.config import TrainConfig, public_settings
from raycontrolnet.run import checkpoint as checkpoints
from raycontrolnet.run import export, model_card, validation
from raycontrolnet.run.trained import CONFIG
from raycontrolnet.tune.records import Report, Trial, control_appeared

BEST = "best"
OF_THE_TRIAL = ("output_dir", "resume_from_checkpoint", "tracker_group")
"""Settings that the next run is not to have."""


def weights_of(trial: Trial) -> Path | None:
    """The folder with what a trial has learned: its final weights, or those of its last checkpoint."""
    places = [trial.folder] if trial.record.state == "finished" else []
    if last := checkpoints.latest(trial.folder):
        places.append(last.path / checkpoints.CONTROLNET)
    return next((place for place in places if all((place / name).is_file() for name in export.WEIGHTS)), None)


def worth(trial: Trial) -> Report:
    """What the weights of `weights_of` were worth: those of a checkpoint may be older than the last report."""
    if trial.record.state == "finished":
        return trial.last
    last = checkpoints.latest(trial.folder)
    return next((one for one in reversed(trial.reports) if last and one["step"] <= last.step), {})


def write_best(
    sweep_dir: Path, trial: Trial, config: TrainConfig, versions: dict[str, str], repo_id: str | None = None
) -> Path | None:
    """Replace best/ by what `trial` has learned.

    Args:
        config: the trial's.
        repo_id: where it will be pushed.

    Returns:
        The folder; None if the trial has no weights yet.
    """
    import yaml

    weights = weights_of(trial)
    if weights is None:
        return None
    new, best = sweep_dir / f".{BEST}.partial", sweep_dir / BEST
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for name in export.WEIGHTS:
        shutil.copyfile(weights / name, new / name)
    settings = {name: value for name, value in public_settings(config).items() if name not in OF_THE_TRIAL}
    head = (
        f"# Settings of trial {trial.record.name}, the best of a sweep. To train anew with them:\n"
        f"#   raycontrolnet train --config {best / CONFIG} --output_dir FOLDER\n"
    )
    (new / CONFIG).write_text(head + yaml.safe_dump(settings, sort_keys=False))
    figures = worth(trial)
    step = int(figures.get("step", 0))
    if drawn := validation.finished_folders(trial.folder, step):
        shutil.copytree(drawn[-1], validation.step_folder(new, validation.results(drawn[-1])[0].step))
    old = sweep_dir / f".{BEST}.old"
    shutil.rmtree(old, ignore_errors=True)
    if best.exists():
        best.rename(old)
    new.rename(best)
    shutil.rmtree(old, ignore_errors=True)
    facts: dict[str, Any] = {**figures, "versions": versions}
    until = [report for report in trial.reports if report["step"] <= step]
    facts |= {"control_appeared_at_step": control_appeared(until) if "control_gap" in facts else None}
    licence = export.find_licence(config, export.find_token(config.hub_token))
    config = dataclasses.replace(config, output_dir=str(best))
    model_card.write_model_card(best, config, facts, repo_id=repo_id, title=sweep_dir.name, licence=licence)
    return best
