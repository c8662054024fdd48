"""The parts of a training state that a checkpoint holds beside the ControlNet: optimizer, averages, loss scaler."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from raycontrolnet.config.output_settings import WEIGHTS_FILE
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.averages import load_averages, new_averages
from raycontrolnet.model.optimizers import constructor_arguments
from raycontrolnet.storage.checkpoint import CONTROLNET_FOLDER, TRAINING_STATE_FILE, Checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

logger = logging.getLogger(__name__)


def build_averages(
    controlnet: torch.nn.Module, config: TrainConfig, checkpoint: Checkpoint | None, saved: Mapping[str, Any]
) -> EMAModel | None:
    """Return the averages of a run, as the checkpoint has them; without any there they begin with its weights."""
    if not config.use_ema:
        return None
    averages = new_averages(controlnet, config.ema_decay)
    if checkpoint and checkpoint.has_averages:
        weights = load_file(checkpoint.path / CONTROLNET_FOLDER / WEIGHTS_FILE)
        load_averages(averages, controlnet, weights, int(saved["averaged_updates"]))
    elif checkpoint:
        logger.info("%s has no averages of the weights: they begin here", checkpoint.path.name)
    return averages


def read_rest(checkpoint: Checkpoint) -> dict[str, Any]:
    """Read what a checkpoint holds besides weights, as `StateParts.rest`.

    Raises:
        UserError: if it is damaged.
    """
    try:
        return dict(torch.load(checkpoint.path / TRAINING_STATE_FILE, map_location="cpu", weights_only=True))
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:  # a checkpoint without checksums
        problem = f"{checkpoint.path / TRAINING_STATE_FILE} is damaged"
        raise UserError(f"--resume_from_checkpoint: {problem}; name an earlier checkpoint") from error


@contextmanager
def _fitting(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn the errors of a state that does not fit the settings into one that says so."""
    try:
        yield
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint.path} does not fit these settings ({error}); continue with the "
            "optimizer settings it was written with (see its manifest.json)"
        ) from error


def updates_in_schedule(checkpoint: Checkpoint, saved: Mapping[str, Any]) -> int:
    """Return the updates that the schedule had counted: without those that fp16's loss scaler skipped."""
    with _fitting(checkpoint):
        return int(saved["lr_scheduler"]["last_epoch"])


def load_optimizer(
    optimizer: torch.optim.Optimizer, accelerator: Accelerator, checkpoint: Checkpoint, saved: Mapping[str, Any]
) -> None:
    """Load the optimizer and the loss scaler as they were saved.

    The arguments of its class, as learning rate, betas and weight decay, are those of the settings, which may be new.

    Raises:
        UserError: if they do not fit the settings.
    """
    with _fitting(checkpoint):
        package = package_of(optimizer)
        before = saved["optimizer_class"], saved.get("optimizer_package", package)
        if before != (type(optimizer).__name__, package):
            of = before[0] if before[1] == package else f"{before[0]} of {before[1]}"
            raise ValueError(f"it holds the state of {of}, not of {type(optimizer).__name__}")
        groups = _groups(optimizer, saved["optimizer"]["param_groups"])
        optimizer.load_state_dict({**saved["optimizer"], "param_groups": groups})
        _lay_out_as_weights(optimizer)
        _keep_dtypes(optimizer, saved["optimizer"]["state"])
        if accelerator.scaler is not None and saved["scaler"] is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])


def package_of(optimizer: torch.optim.Optimizer) -> str:
    """Return the name of the package that an optimizer's class is from."""
    return type(optimizer).__module__.partition(".")[0]


def _groups(optimizer: torch.optim.Optimizer, saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the optimizer's groups, with what the class itself keeps there, as Prodigy its estimates, as saved."""
    own = {*constructor_arguments(type(optimizer)), "params", "lr", "initial_lr"}
    groups = optimizer.state_dict()["param_groups"]
    return [
        group | {name: value for name, value in before.items() if name not in own}
        for group, before in zip(groups, saved, strict=True)
    ]


def _keep_dtypes(optimizer: torch.optim.Optimizer, saved: Mapping[int, Any]) -> None:
    """Give the state the dtypes that it was saved in; torch loads it in those of the weights."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, values in saved.items():
        state = optimizer.state[weights[index]]
        for name, value in values.items():
            loaded = state.get(name)
            if isinstance(value, torch.Tensor) and isinstance(loaded, torch.Tensor) and loaded.dtype != value.dtype:
                state[name] = value.to(loaded.device)


def _lay_out_as_weights(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments the memory layout of their weights, which fused kernels need, whatever the files had."""
    for weight, moments in optimizer.state.items():
        for name, moment in moments.items():
            if isinstance(moment, torch.Tensor) and moment.shape == weight.shape:
                moments[name] = torch.empty_like(weight, dtype=moment.dtype).copy_(moment)
