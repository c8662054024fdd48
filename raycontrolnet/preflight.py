"""Before a run: everything that can be checked before Ray starts and models are read, all problems at once."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import logging
import secrets
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycontrolnet import __version__
from raycontrolnet.config import TrainConfig, public_settings
from raycontrolnet.data.latents import LatentCache
from raycontrolnet.data.order import SampleOrder
from raycontrolnet.data.sources import Source, open_source
from raycontrolnet.data.stream import BatchLoader, PixelRows
from raycontrolnet.errors import ConfigError, UserError
from raycontrolnet.run import checkpoint as checkpoints
from raycontrolnet.run import export, trackers, validation
from raycontrolnet.run.follower import Follower
from raycontrolnet.run.job import Job
from raycontrolnet.run.plan import RunPlan

logger = logging.getLogger(__name__)

BASE_PARTS = ("unet", "vae", "text_encoder", "scheduler")
"""Folders of a base model."""
VERSIONS_OF = ("ray", "torch", "diffusers", "transformers", "accelerate", "datasets")


def versions() -> dict[str, str]:
    """Of this package and those that decide what a run computes."""
    return {"raycontrolnet": __version__} | {name: importlib.metadata.version(name) for name in VERSIONS_OF}


@dataclass(frozen=True)
class CheckedRun:
    """A run whose input has been checked."""

    config: TrainConfig
    """With absolute paths and a seed."""
    output_dir: Path
    source: Source
    start: checkpoints.Checkpoint | None
    token: str | None = dataclasses.field(repr=False)
    cache: LatentCache | None = None
    """Where samples come from, if not from the source's pixels."""
    bad_rows: tuple[int, ...] = ()
    """Those that the cache left out."""
    random_subset: bool = False
    """Whether max_train_samples takes other rows in every run, because no seed was given."""
    run_id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def loader(self) -> BatchLoader:
        assert self.config.seed is not None
        config = self.config
        return BatchLoader(
            rows=self.cache or PixelRows(self.source, config.resolution),
            order=SampleOrder(
                len(self.source),
                self.config.seed,
                config.max_train_samples,
                self.bad_rows,
                config.num_held_out(len(self.source)),
            ),
            batch_size=config.train_batch_size,
            proportion_empty_prompts=config.proportion_empty_prompts,
        )

    def plan(self, world_size: int, checkpoint: checkpoints.Checkpoint | None) -> RunPlan:
        return RunPlan.of(self.config, self.loader.order.num_samples, world_size, checkpoint)

    def last_checkpoint(self) -> checkpoints.Checkpoint | None:
        """The last one of this run, or where it started."""
        return checkpoints.latest(self.output_dir, self.run_id) or self.start

    def job(
        self,
        *,
        use_gpu: bool,
        threads: int | None,
        loader: Any,
        spare: Mapping[str, Any] | None = None,
        follower: Follower | None = None,
    ) -> Job:
        """What the workers get; see there. `loader` is that of the run, or a reference to it."""
        config, order = self.config, self.loader.order
        assert config.seed is not None
        return Job(
            config=dataclasses.replace(config, hub_token=None),
            run_id=self.run_id,
            num_samples=order.num_samples,
            num_held_out=len(order.held_out),
            start=self.start,
            use_gpu=use_gpu,
            cached=self.cache is not None,
            threads=threads,
            trackers=trackers.resolve(config.report_to),
            tracker_settings=public_settings(config),
            validation_items=tuple(validation.plan(config, config.seed)),
            facts={
                "settings": public_settings(config),
                "data": self.source.fingerprint(),
                "left_out": list(self.bad_rows),
                "held_out": config.num_held_out(len(self.source)),
                "versions": versions(),
            },
            token=self.token,
            loader=loader,
            spare=spare,
            follower=follower,
        )


def check(config: TrainConfig, output_dir: Path) -> CheckedRun:
    """Everything that can be checked before Ray starts and models are read.

    Raises:
        ConfigError: with the problems of settings, model folders, output folder, validation images and data together.
    """
    problems = list(trackers.check_trackers(config.trackers if config.report_to != "all" else ()))
    problems += missing_extras(config)
    problems += local_model_problems(config)
    problems += export.check_push(config)
    if problem := unwritable(output_dir, "output_dir"):
        problems.append(problem)
    else:
        checkpoints.remove_leftovers(output_dir)
    token = export.find_token(config.hub_token)
    start, source = None, None
    with collected(problems):
        start = checkpoints.resolve(config.resume_from_checkpoint, output_dir)
    with collected(problems):
        validation.check(config)
    with collected(problems):
        source = open_source(config, cache_dir=config.cache_dir, token=token, skip_bad=config.on_bad_sample == "skip")
    if problems or source is None:
        raise ConfigError(problems)
    config = _with_held_out_rows(config, len(source), start)
    random_subset = config.seed is None and start is None and (config.max_train_samples or len(source)) < len(source)
    if config.seed is None:
        config = dataclasses.replace(config, seed=start.seed if start else secrets.randbelow(2**31))
    if start is not None:
        for what, now in (("seed", config.seed), ("data", source.fingerprint())):
            if start.manifest[what] != now:
                logger.warning("%s was made with another %s: the order of samples changes", start.path, what)
        if start.manifest.get("held_out", 0) != config.num_held_out(len(source)):
            logger.warning(
                "%s was made with other rows held out: it has seen rows that are measured now, and the order changes",
                start.path,
            )
    return CheckedRun(config, output_dir, source, start, token, random_subset=random_subset)


def missing_extras(config: TrainConfig) -> Iterator[str]:
    """Optional packages that the settings need and that are not installed."""
    for flag, needed, package, extra in (
        ("use_8bit_adam", config.use_8bit_adam, "bitsandbytes", "8bit"),
        ("enable_xformers_memory_efficient_attention", config.enable_xformers_memory_efficient_attention, "xformers",
         "xformers"),
    ):  # fmt: skip
        if needed and importlib.util.find_spec(package) is None:
            yield f"--{flag}: {package} is not installed; run pip install 'raycontrolnet[{extra}]'"


def _with_held_out_rows(config: TrainConfig, num_rows: int, start: checkpoints.Checkpoint | None) -> TrainConfig:
    """The settings, with as many held-out rows as the run had that goes on, unless they say how many.

    Raises:
        ConfigError: if no row would be left to train on.
    """
    before = start.manifest.get("held_out", 0) if start else None
    if config.validation_split is None and before not in (None, config.num_held_out(num_rows)):
        config = dataclasses.replace(config, validation_split=before)
    if config.num_held_out(num_rows) >= num_rows:
        problem = f"--validation_split={config.validation_split:g}: leaves none of the {num_rows:,} rows to train on"
        raise ConfigError([f"{problem}; hold out fewer, or 0"])
    return config


def check_inputs(config: TrainConfig) -> tuple[Source, str | None]:
    """What the encoding of latents needs: the data, and the Hub token.

    Raises:
        ConfigError: with the problems of model folders and data together.
    """
    problems = list(local_model_problems(config))
    token, source = export.find_token(config.hub_token), None
    with collected(problems):
        source = open_source(config, cache_dir=config.cache_dir, token=token, skip_bad=True)
    if problems or source is None:
        raise ConfigError(problems)
    return source, token


@contextmanager
def collected(problems: list[str]) -> Iterator[None]:
    """Add what a check raises to `problems`, so that the others are made as well."""
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def local_model_problems(config: TrainConfig) -> Iterator[str]:
    """Model folders that are named as paths but are not there; Hub ids are found out by the workers."""
    for flag, parts in (
        ("pretrained_model_name_or_path", BASE_PARTS),
        ("controlnet_model_name_or_path", ()),
        ("tokenizer_name", ()),
    ):
        name = getattr(config, flag)
        if name is not None and (problem := not_a_model(name, flag, parts)):
            yield problem


def not_a_model(name: str, flag: str, parts: Sequence[str]) -> str | None:
    """What is wrong with the folder `name`, which must have all of `parts`; Hub ids pass."""
    path = Path(name)
    if path.is_dir():
        missing = [part for part in parts if not (path / part).is_dir()]
        if missing:
            return f"--{flag}={name}: no {', '.join(missing)} in that folder; it must be in diffusers' layout"
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        return f"--{flag}={name}: no such folder, and not the form of a Hub id (owner/name)"
    return None


def unwritable(folder: Path, flag: str) -> str | None:
    """What keeps results from being written to `folder`, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # os.access tells root that it may, also where it may not
            pass
    except OSError as error:
        return f"--{flag}={folder}: cannot be written ({error.strerror}); name another folder"
    return None


def with_absolute_paths(config: TrainConfig, output_dir: Path) -> TrainConfig:
    """Paths as workers in other directories must see them; names that are no paths here (Hub ids) stay."""
    paths: dict[str, Any] = {"output_dir": str(output_dir)}
    for name in (
        "pretrained_model_name_or_path", "controlnet_model_name_or_path", "tokenizer_name", "cache_dir",
        "train_data_dir", "dataset_name",
    ):  # fmt: skip
        value = getattr(config, name)
        if value is not None and (Path(value).expanduser().exists() or name in ("cache_dir", "train_data_dir")):
            paths[name] = str(Path(value).expanduser().resolve())
    if config.latents_cache_dir is not None and "://" not in config.latents_cache_dir:
        paths["latents_cache_dir"] = str(Path(config.latents_cache_dir).expanduser().resolve())
    if config.validation_image:
        paths["validation_image"] = tuple(str(Path(path).expanduser().resolve()) for path in config.validation_image)
    return dataclasses.replace(config, **paths)


def check_device(config: TrainConfig, *, use_gpu: bool, has_gpu: bool) -> None:
    """What can be known only once the device is.

    Raises:
        ConfigError: if a setting cannot run on it.
    """
    if use_gpu and not has_gpu:
        raise ConfigError(["--use_gpu=True: there is no GPU here; leave the flag out to train on the CPU"])
    if config.mixed_precision == "fp16" and not use_gpu:
        raise ConfigError(["--mixed_precision=fp16: needs a GPU; use bf16 or no on the CPU"])
    if config.enable_xformers_memory_efficient_attention and not use_gpu:
        raise ConfigError(["--enable_xformers_memory_efficient_attention: needs a GPU; leave it out on the CPU"])
