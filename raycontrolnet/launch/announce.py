"""The first lines of a run: what it is, and config.yaml."""

from __future__ import annotations

import logging
from typing import TextIO

from raycontrolnet.config.data_sources import sources_of
from raycontrolnet.config.train_config import changed_settings, public_settings
from raycontrolnet.data.augmentation import RANDOM
from raycontrolnet.data.joined_source import named_sources
from raycontrolnet.data.mixture import in_words as sources_in_words
from raycontrolnet.data.sides import side_warning
from raycontrolnet.launch.checked_run import CheckedRun
from raycontrolnet.launch.precision import in_words
from raycontrolnet.launch.resumed_run import changed_training
from raycontrolnet.model.graphs import no_graphs_because
from raycontrolnet.sampling.find_controlnet import CONFIG_FILE
from raycontrolnet.storage.files import replace_text
from raycontrolnet.text import counted
from raycontrolnet.training.schedule import warmup_warning
from raycontrolnet.training.status import RunStatus
from raycontrolnet.version import __version__

logger = logging.getLogger(__name__)


def announce(run: CheckedRun, status: RunStatus, stream: TextIO, *, use_gpu: bool) -> None:
    """Announce the run, and write config.yaml."""
    import yaml

    settings = public_settings(run.config)
    del settings["resume_from_checkpoint"]  # the file is for another run with the same settings
    replace_text(run.output_dir / CONFIG_FILE, yaml.safe_dump(settings, sort_keys=False))
    schedule = run.schedule(run.start)
    status |= {"total_updates": schedule.total_updates, "held_out": len(run.order.held_out)}
    parts = zip(sources_of(run.config), named_sources(run.source), strict=True)
    status["data"] = [{"source": config.shown, "rows": len(part)} for config, part in parts]
    status["latents_cache"] = run.cache.folder.name if run.cache else None
    status["mixed_precision"] = run.config.mixed_precision or "no"
    fewest, most = run.config.worker_range
    status["num_workers"] = most if fewest == most else run.config.num_workers
    status["processes"] = run.config.most_workers if fewest == most else None  # of an elastic run workers say it
    status.write()
    step = run.start.step if run.start else 0
    source = "" if run.cache is None else " from cached latents"
    workers = f"{fewest} to {most} workers" if fewest < most else counted(run.config.most_workers, "worker")
    workers += f" on {'GPUs' if use_gpu else 'CPUs'}"
    precision = run.config.mixed_precision  # on a CPU without one there is nothing to say
    shown = f", {in_words(precision, run.precision_reason)}" if precision else ""
    stream.write(
        f"raycontrolnet {__version__}: {schedule.num_samples} samples{source}, {workers} x batch "
        f"{schedule.batch_size} x accumulation {schedule.accumulation_steps}, updates {step} to "
        f"{schedule.total_updates}, seed {run.config.seed}{shown}\n"
    )
    if sources := sources_in_words(run.source, run.config):
        stream.write(f"data: {sources}\n")
    _announce_augmentation(run, stream)
    if run.config.resume_from_checkpoint and run.start is None:
        stream.write("no checkpoint is there yet: the run starts anew\n")
    if run.start and step >= schedule.total_updates:
        length = "num_train_epochs" if run.config.max_train_steps is None else "max_train_steps"
        stream.write(
            f"nothing is left to train: {run.start.path.name} has {step} updates, and --{length}="
            f"{getattr(run.config, length)} asks for no more; raise it to train on\n"
        )
    if run.start:
        stream.writelines(f"{line}\n" for line in changed_training(run.config, run.start))
    if warning := warmup_warning(run.config, schedule.total_updates):
        stream.write(f"{warning}\n")
    stream.writelines(f"{warning}\n" for warning in run.config.without_effect())
    why = no_graphs_because(run.config, on_gpu=use_gpu, num_workers=fewest)
    if run.config.cuda_graphs == "on" and why:
        stream.write(f"--cuda_graphs on: has no effect; {why}\n")
    changed = ", ".join(f"{name}={value}" for name, value in changed_settings(run.config).items())
    logger.info("settings: %s", changed)


def _announce_augmentation(run: CheckedRun, stream: TextIO) -> None:
    """Announce what random augmentation does to samples, and captions that it contradicts."""
    config, parts = run.config, []
    if config.random_flip:
        parts.append("half of the samples are mirrored" + (", from latents stored both ways" if run.cache else ""))
    if config.crop == RANDOM:
        fixed = "each row has one random crop, for its latents are cached (--cache_latents off draws one for every use)"
        parts.append(fixed if run.cache else "every use of a row has its own random crop")
    if parts:
        stream.write(f"augmentation: {'; '.join(parts)}; not of held-out rows and validation images\n")
    if config.random_flip and (warning := side_warning(run.source)):
        stream.write(f"{warning}\n")
