"""The final weights of a run: at the root of output_dir in diffusers' form, and as one file for other programs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raycontrolnet.config.output_settings import WEIGHTS_FILE, OutputConfig
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.errors import RunError
from raycontrolnet.model.averages import averaged
from raycontrolnet.model.components import load_controlnet
from raycontrolnet.model.families.registry import family_of
from raycontrolnet.model.step import TrainState
from raycontrolnet.storage.files import check_open, read_json, readable_by_umask
from raycontrolnet.storage.run_folder import RunFolder
from raycontrolnet.training.named_files import begin_named_file, end_named_file
from raycontrolnet.training.state import FORMAT, save_controlnet_config, unwrap_controlnet
from raycontrolnet.training.store_sync import MODEL_CONFIG, final_files

if TYPE_CHECKING:
    from diffusers import ModelMixin

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def save_final_weights(state: TrainState, config: TrainConfig, folder: RunFolder) -> None:
    """Write the ControlNet to the root of a run's folder, each file whole or not at all, and send it to a store.

    Averages of its weights are written in their place.

    Raises:
        RunError: if the precision cannot hold the weights.
    """
    output_dir = folder.path
    check_open(output_dir)
    partial = output_dir / ".final.partial"
    shutil.rmtree(partial, ignore_errors=True)
    controlnet = unwrap_controlnet(state)
    save_controlnet_config(controlnet, partial)
    prediction_type = state.components.noise_scheduler.config.get("prediction_type")
    metadata = modelspec(read_json(partial / MODEL_CONFIG), config, prediction_type=prediction_type)
    try:
        with averaged(controlnet, state.averages):
            write_weights(controlnet.state_dict(), partial, config, metadata)
    except OverflowError as error:
        advice = "continue the finished run with --resume_from_checkpoint latest --save_precision bf16"
        raise RunError(f"--save_precision={config.save_precision}: {error}; {advice}") from error
    readable_by_umask(partial)
    begin_named_file(folder, config.single_file, partial)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == MODEL_CONFIG):  # the weights before it
        check_open(output_dir)
        os.replace(file, output_dir / file.name)
    partial.rmdir()
    for files in final_files(config):
        folder.push(files)
    end_named_file(folder, config.single_file)


def write_weights(
    weights: Mapping[str, torch.Tensor], folder: Path, output: OutputConfig, metadata: Mapping[str, str]
) -> None:
    """Write weights in the precision of the settings, under diffusers' file name and in the one file of `save_name`.

    Args:
        metadata: of the one file.

    Raises:
        OverflowError: if the precision cannot hold them.
    """
    from safetensors.torch import save_file

    dtype = DTYPES[output.save_precision]
    saved = {name: value.detach().to("cpu", dtype).contiguous() for name, value in weights.items()}
    for name, value in weights.items():
        if dtype == torch.float16 and not saved[name].isfinite().all():
            raise OverflowError(f"cannot hold {name} (up to {value.abs().max():.3g})")
    save_file(saved, folder / WEIGHTS_FILE, FORMAT)
    if output.single_file:
        save_file(saved, folder / output.single_file, {**FORMAT, **metadata})


def modelspec(
    controlnet: Mapping[str, Any], config: TrainConfig, *, prediction_type: str | None = None
) -> dict[str, str]:
    """Return what Stability AI's ModelSpec has files say of themselves; empty if the kind of base has no name there.

    Args:
        controlnet: its configuration.
        config: the settings.
        prediction_type: the base model's, if it is known.
    """
    family = family_of(controlnet)
    architecture = family.modelspec_architecture(controlnet, prediction_type) if family else None
    if architecture is None:
        return {}
    predicted = {"epsilon": "epsilon", "v_prediction": "v"}.get(prediction_type or "")
    fields = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/controlnet",
        "implementation": "diffusers",
        "title": config.save_name or "",
        "resolution": f"{config.resolution}x{config.resolution}",
        **({"prediction_type": predicted} if predicted else {}),
    }
    return {f"modelspec.{name}": value for name, value in fields.items()}


def copy_weights(folder: Path, to: Path, config: TrainConfig) -> None:
    """Write a run's final weights, or a checkpoint's, to the folder `to`, as the run with these settings would.

    Args:
        folder: with `MODEL_CONFIG` and `WEIGHTS_FILE`.
        to: a folder.
        config: the run's settings.

    Raises:
        OverflowError: if the precision cannot hold them; nothing with weights is written.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    metadata = modelspec(read_json(folder / MODEL_CONFIG), config)
    if config.single_file and (folder / config.single_file).is_file():
        with safe_open(folder / config.single_file, framework="pt") as file:
            metadata = file.metadata()
    shutil.copyfile(folder / MODEL_CONFIG, to / MODEL_CONFIG)
    write_weights(load_file(folder / WEIGHTS_FILE), to, config, metadata)
    readable_by_umask(to)


def saved_controlnet(folder: Path, like: TrainState) -> ModelMixin:
    """Return the ControlNet of `folder`, frozen, on the device of `like`."""
    controlnet = load_controlnet(str(folder), like.components.family, flag="output_dir")
    return controlnet.requires_grad_(False).eval().to(like.accelerator.device)
