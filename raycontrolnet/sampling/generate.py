"""`raycontrolnet generate`: images from a trained ControlNet, drawn by the code that draws validation images.

It runs in the calling process, without Ray: check everything, load the models once, draw batch by batch.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from raycontrolnet.cluster.logs import logging_to, shown_on
from raycontrolnet.config.checks import check_device, collected, find_token, unwritable
from raycontrolnet.config.generate_config import GenerateConfig
from raycontrolnet.config.objective_settings import ObjectiveConfig
from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.data.buckets import bucket_sizes
from raycontrolnet.errors import ConfigError, explained
from raycontrolnet.model.base_family import base_family, objective_problems, resolution_problem
from raycontrolnet.model.components import Components, load_components
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.families.registry import families
from raycontrolnet.model.loading import BASE
from raycontrolnet.model.performance import memory_advised, tf32, working_precision
from raycontrolnet.model.problems import model_problems
from raycontrolnet.model.prompts import cut
from raycontrolnet.quiet import MODEL_LIBRARIES, no_progress_bars
from raycontrolnet.sampling import find_controlnet, images, scores
from raycontrolnet.sampling.images import METADATA, ImageItem, PairImages
from raycontrolnet.sampling.pipeline import DrawOptions
from raycontrolnet.storage.files import removed_if_empty
from raycontrolnet.storage.uri import shown_name
from raycontrolnet.text import counted, duration
from raycontrolnet.version import __version__

logger = logging.getLogger(__name__)

LOG = "generate.log"
DEFAULT_RESOLUTION = 512


@dataclass(frozen=True)
class _Task:
    """Checked input: what to draw, and where to."""

    config: GenerateConfig
    """Missing settings are filled in from the run's."""
    model: ModelConfig
    items: Sequence[ImageItem]
    options: DrawOptions
    out: Path
    device: torch.device
    allow_tf32: bool
    token: str | None = field(repr=False)


def generate(config: GenerateConfig, *, stream: TextIO | None = None) -> list[PairImages]:
    """Draw images with a trained ControlNet, one file each, into `config.out`.

    It works in the calling process, without Ray. An image depends on its place among the pairs, the seed, the other
    settings and the weights: with the settings of a run's validation it equals that of the run's last validation, on
    the CPU bit for bit.

    Args:
        config: what to draw, with which ControlNet, and how.
        stream: where progress is shown; standard error by default.

    Returns:
        The images of each pair.

    Raises:
        UserError: bad settings, images or models (exit code 2 on the command line).
        RunError: it failed, as on a full disk; finished images stay (exit code 1).
        Interrupted: Ctrl-C or SIGTERM; finished images stay (exit code 130 or 143).
    """
    with shown_on(stream) as shown, removed_if_empty(Path(config.out).expanduser()):
        return _generate(config, shown)


def _generate(config: GenerateConfig, stream: TextIO) -> list[PairImages]:
    started = time.monotonic()
    task = _check(config)
    drawn: list[ImageItem] = []
    with (
        logging_to(task.out / LOG, of_ray=False),
        explained("Drawing", partial(_what_stands, task, drawn), task.out / LOG),
        memory_advised(partial(_memory_advice, task.config)),
    ):
        _announce(task, stream)
        with no_progress_bars(*MODEL_LIBRARIES), tf32(allowed=task.allow_tf32):
            components = load_components(
                task.model,
                device=task.device,
                dtype=task.options.precision,
                seed=0,
                token=task.token,
                controlnet_flag="controlnet",
                objective=_objective(task.config),
            )
            for prompt in dict.fromkeys(config.prompt or ()):
                if problem := cut(components.tokenizers, prompt):
                    stream.write(f"{problem}\n")
            results = _draw(task, components, drawn, stream)
    seconds = time.monotonic() - started
    fidelity = _fidelity(task, results)
    stream.write(
        f"done in {duration(seconds)}: {counted(len(drawn), 'image')}, grids and {METADATA} in {task.out}{fidelity}\n"
    )
    return results


def _fidelity(task: _Task, results: Sequence[PairImages]) -> str:
    """Return the end of the last line: the average score of the images."""
    measure, found = task.config.control_fidelity, images.fidelity_of(results)
    if measure is None:
        return ""
    return f"; {scores.in_words(found)} ({measure})" if found else f"; no control fidelity, {task.out / LOG} says why"


def _check(config: GenerateConfig) -> _Task:
    """Check everything that can be checked before models are loaded.

    Raises:
        ConfigError: with the problems of images, models, folder and device together.
    """
    given, problems, model, use_gpu = config, list[str](), None, False
    settings: dict[str, Any] = {}
    items: list[ImageItem] = []
    out = Path(config.out).expanduser().resolve()
    with collected(problems):
        images.check(config.pairs, "--image")
        items = images.plan(config.pairs, config.num_images, config.seed, "--image")
    with collected(problems):
        found = find_controlnet.find(config.controlnet)
        settings = found.settings_with(config.pretrained_model_name_or_path)
        config = config.with_defaults(settings)
        model = _model(config, given, found, settings.get("tokenizer_name"))
    with collected(problems):
        from_run = () if given.mixed_precision else ("mixed_precision",)
        has_gpu = torch.cuda.is_available()
        use_gpu = check_device(config.use_gpu, config, has_gpu=has_gpu, work="draw", from_run=from_run)
    if problem := unwritable(out, "out"):
        problems.append(problem)
    else:
        problems += _overwritten(out, items, config)
    if problems or model is None:
        raise ConfigError(problems)
    device = torch.device("cuda" if use_gpu else "cpu")
    allow_tf32, token = settings.get("allow_tf32", False), find_token(config.hub_token)
    seen = base_family(model, token)
    family = seen or families()[0]
    options = _options(config, settings.get("image_interpolation_mode"), family)
    if settings.get("aspect_buckets") and given.resolution is None:
        sizes = bucket_sizes(options.resolution, family.resolution_multiple)
        options = dataclasses.replace(options, bucket_sizes=sizes)
    if problem := resolution_problem(options.resolution, family):
        raise ConfigError([problem])
    if problems := _schedule_problems(config, given, model, seen, token):
        raise ConfigError(problems)
    return _Task(config, model, items, options, out, device, allow_tf32, token)


def _schedule_problems(
    config: GenerateConfig, given: GenerateConfig, model: ModelConfig, family: Family | None, token: str | None
) -> list[str]:
    """Return why the base model cannot draw with the noise that the settings or the run have."""
    advice = "" if given.rescale_betas_zero_snr else "; the run has it, --rescale_betas_zero_snr False draws without"
    return [f"{problem}{advice}" for problem in objective_problems(model, _objective(config), family, token)]


def _objective(config: GenerateConfig) -> ObjectiveConfig:
    """Return the objective as far as images depend on it."""
    return ObjectiveConfig(rescale_betas_zero_snr=bool(config.rescale_betas_zero_snr))


def _options(config: GenerateConfig, interpolation: str | None, family: Family) -> DrawOptions:
    return DrawOptions(
        config.resolution or DEFAULT_RESOLUTION,
        config.num_inference_steps,
        family.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        working_precision(config.mixed_precision),
        config.batch_size,
        config.control_fidelity,
        interpolation or family.interpolation,
        family.sampler,
    )


def _model(
    config: GenerateConfig, given: GenerateConfig, found: find_controlnet.FoundControlNet, tokenizer_name: str | None
) -> ModelConfig:
    """Return base model and ControlNet.

    Raises:
        ConfigError: if one is not known, or not in the folder that is named.
    """
    base = _expanded(config.pretrained_model_name_or_path)
    model = ModelConfig(
        pretrained_model_name_or_path=base or "",
        pretrained_vae_model_name_or_path=_expanded(config.pretrained_vae_model_name_or_path),
        base_config=_expanded(config.base_config),
        controlnet_model_name_or_path=found.name_or_path,
        revision=config.revision,
        variant=config.variant,
        tokenizer_name=_expanded(tokenizer_name),
        cache_dir=_expanded(config.cache_dir),
    )
    problems = []
    for problem in model_problems(model, find_token(config.hub_token), controlnet_flag="controlnet"):
        from_run = given.pretrained_model_name_or_path is None and problem.startswith(f"--{BASE}=")
        problems.append(f"{problem}; {found.config_file} names it" if from_run else problem)
    if base is None:
        problems.append(
            "--pretrained_model_name_or_path: required, because no config.yaml of a run says which base model "
            f"{shown_name(config.controlnet)} was trained for"
        )
    if problems:
        raise ConfigError(problems)
    return model


def _expanded(path: str | None) -> str | None:
    """Return a path without ~; a Hub id, which has none, as it is."""
    return str(Path(path).expanduser()) if path and path.startswith("~") else path


def _overwritten(out: Path, items: Sequence[ImageItem], config: GenerateConfig) -> Iterator[str]:
    """Yield the problem of files in `out` that would be replaced. An earlier `generate`, which left its log, may be."""
    written = {METADATA}
    for item in items:
        written |= {item.file_name, item.control_file_name, item.grid_file_name}
    for path in dict.fromkeys(config.image or ()):
        file = Path(path).resolve()
        if file.parent == out and file.name in written:
            yield f"--image={path}: would be overwritten by the new images; name another --out"
    lost = sorted(name for name in written if (out / name).exists())
    if lost and not (out / LOG).is_file():
        yield (
            f"--out={config.out}: holds {lost[0]}, which was not made by `raycontrolnet generate` and would be "
            "overwritten; name another folder"
        )


def _announce(task: _Task, stream: TextIO) -> None:
    config, options = task.config, task.options
    device = "GPU" if task.device.type == "cuda" else "CPU"
    precision = "" if options.precision == torch.float32 else f" in {config.mixed_precision}"
    side = options.resolution
    size = f"about {side} x {side} px in the control image's shape" if options.bucket_sizes else f"{side} px"
    what = (
        f"{shown_name(config.controlnet)} on {task.model.pretrained_model_name_or_path}, "
        f"{counted(len(config.pairs), 'pair')} x "
        f"{counted(config.num_images, 'image')} of {size}, "
        f"{counted(config.num_inference_steps, 'step')}, guidance {options.guidance_scale:g}, "
        f"seed {config.seed}, on the {device}{precision}"
    )
    logger.info(what)
    stream.write(f"raycontrolnet {__version__}: {what}\n")


def _draw(task: _Task, components: Components, drawn: list[ImageItem], stream: TextIO) -> list[PairImages]:
    """Draw all items, and finish the folder for those in `drawn`, also when something ends the drawing early."""
    try:
        for item in images.write(task.out, task.items, components, task.options):
            drawn.append(item)
            stream.write(f"{task.out / item.file_name}\n")
            stream.flush()
    finally:
        results = images.finish(task.out, drawn, task.options)
    return results


def _what_stands(task: _Task, drawn: Sequence[ImageItem]) -> str:
    there = f"{len(drawn):,} of {counted(len(task.items), 'image')} stand in {task.out}."
    return there if drawn else "No image was drawn."


def _memory_advice(config: GenerateConfig) -> str:
    smaller = "--batch_size" if config.batch_size > 1 else "--resolution"
    half = ", or --mixed_precision bf16" if working_precision(config.mixed_precision) == torch.float32 else ""
    return f"Use a smaller {smaller}{half}"
