"""Problems with a base model that is a single file, found without reading weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.families.registry import (
    denoiser_config,
    denoiser_configs,
    denoiser_problem,
    family_of,
    pipeline_problem,
)
from raycontrolnet.model.files import SCHEDULER_CONFIG, ModelFiles, NotThere, Unreachable
from raycontrolnet.model.single_file import (
    BASE_CONFIG,
    NotABase,
    base_files,
    config_place,
    download_command,
    layout_of,
    predicts_velocity,
    read_header,
)
from raycontrolnet.text import error_message

logger = logging.getLogger(__name__)


def single_file_problem(path: Path) -> str | None:
    """Return what is wrong with a .safetensors file that is given as base model, by itself; None if nothing is."""
    try:
        layout_of(read_header(path), with_vae=False)
    except NotABase as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error_message(error, 80)})"
    return None


def single_file_config(model: ModelConfig, token: str | None, *, elsewhere: bool) -> dict[str, Any]:
    """Return the configuration of the denoiser of a single-file base; empty if it is not known yet.

    Args:
        model: names the file, and perhaps the configurations.
        token: for private models on the Hub.
        elsewhere: other machines load the model, and may reach the Hub where this one does not.

    Raises:
        NotABase: with what is wrong with the file or the configurations.
        NotKnown: the Hub gives no answer to go by.
        OSError: the file cannot be read.
    """
    path = Path(model.pretrained_model_name_or_path).expanduser()
    for name in ("variant", "revision"):
        if getattr(model, name) is not None:
            raise NotABase(f"is a single file, which has no --{name} (given: {getattr(model, name)}); leave it out")
    header = read_header(path)
    layout_of(header, with_vae=model.pretrained_vae_model_name_or_path is None)
    place = config_place(model)
    try:
        files = base_files(model, token, denoiser_configs())
        missing = next(_missing(files, model), None)
    except Unreachable:
        if elsewhere:
            return {}
        raise NotABase(_download_advice(place)) from None
    except NotThere as error:
        reason = str(error).partition(";")[0]
        raise NotABase(f"has its configuration from {place}: {reason}; --{BASE_CONFIG} names another") from None
    if missing and files.names is None:
        raise NotABase(_download_advice(place))
    if missing:
        raise NotABase(f"has its configuration from {place}, which has no {missing}; --{BASE_CONFIG} names another")
    config, scheduler = denoiser_config(files), files.read_json(SCHEDULER_CONFIG)
    problem = (
        denoiser_problem(config)
        or pipeline_problem(files.read_json("model_index.json"), _family(config))
        or _family(config).scheduler_problem(scheduler)
        or _family(config).file_problem(config, header)
    )
    if problem:
        raise NotABase(f"has its configuration from {place}, which {problem}; --{BASE_CONFIG} names another")
    predicted = scheduler.get("prediction_type", "epsilon")
    if predicts_velocity(header) and predicted != "v_prediction":
        raise NotABase(
            f"predicts the velocity (it has v_pred), and its configuration, {place}, has {predicted}; give "
            f"--{BASE_CONFIG} with a folder whose {SCHEDULER_CONFIG} has v_prediction"
        )
    if model.base_config is None and predicted != "epsilon":  # weights do not tell
        logger.warning("%s is taken to predict %s, as %s; --%s names another", path.name, predicted, place, BASE_CONFIG)
    return config


def _family(config: dict[str, Any]) -> Family:
    family = family_of(config)
    assert family is not None  # denoiser_problem comes first
    return family


def _missing(files: ModelFiles, model: ModelConfig) -> Iterator[str]:
    """Yield the files that are needed and missing: one is enough to know."""
    family = family_of(denoiser_config(files))
    if family is None:
        yield denoiser_configs()[0]
        return
    needed: list[tuple[str, ...]] = [(f"{part}/config.json",) for part in family.part_classes]
    needed += [(SCHEDULER_CONFIG,)]
    own = family.tokenizers[1:] if model.tokenizer_name else family.tokenizers
    needed += [(f"{folder}/vocab.json", f"{folder}/tokenizer.json") for folder in own]
    for names in needed:
        if not any(_has(files, name) for name in names):
            yield names[0]


def _has(files: ModelFiles, name: str) -> bool:
    return files.find(name) is not None if files.names is None else name in files.names


def _download_advice(place: str) -> str:
    command = download_command(place)
    return f"its configuration is not in the Hub's cache; run `{command}` where the Hub can be reached"
