"""The parts of a training state that a checkpoint holds beside the ControlNet: optimizer, averages, loss scaler."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from raycontrolnet.config.output_settings import WEIGHTS_FILE
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.averages import load_averages, new_averages
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
        if checkpoint and checkpoint.has_averages:
            logger.warning("the averages of %s are left out; --use_ema goes on with them", checkpoint.path.name)
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


def load_optimizer(
    optimizer: torch.optim.Optimizer, accelerator: Accelerator, checkpoint: Checkpoint, saved: Mapping[str, Any]
) -> int:
    """Load the optimizer and the loss scaler as they were saved; return the updates that the schedule counted.

    Only the moments are loaded: learning rate, betas and weight decay are those of the settings, which may be new.

    Raises:
        UserError: if they do not fit the settings.
    """
    try:
        if saved["optimizer_class"] != type(optimizer).__name__:
            raise ValueError(f"it holds the state of {saved['optimizer_class']}, not of {type(optimizer).__name__}")
        settings = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({**saved["optimizer"], "param_groups": settings})
        _lay_out_as_weights(optimizer)
        if accelerator.scaler is not None and saved["scaler"] is not None:
            accelerator.scaler.load_state_dict(saved["scaler"])
        return int(saved["lr_scheduler"]["last_epoch"])
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"--resume_from_checkpoint: {checkpoint.path} does not fit these settings ({error}); continue with the "
            "optimizer settings it was written with (see its manifest.json)"
        ) from error


def _lay_out_as_weights(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments the memory layout of their weights, which fused kernels need, whatever the files had."""
    for weight, moments in optimizer.state.items():
        for name, moment in moments.items():
            if isinstance(moment, torch.Tensor) and moment.shape == weight.shape:
                moments[name] = torch.empty_like(weight, dtype=moment.dtype).copy_(moment)
