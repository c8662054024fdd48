"""The optimizer and its learning-rate schedule, counted in optimizer updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from raycontrolnet.config.optimizer_settings import ADAMW
from raycontrolnet.config.settings import OptimConfig
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.errors import UserError
from raycontrolnet.model.optimizers import arguments_of, fuses, new_optimizer, try_optimizer


def build_optimizer(
    parameters: Sequence[torch.nn.Parameter], optim: TrainConfig, learning_rate: float, *, fused: bool = True
) -> torch.optim.Optimizer:
    """Build AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101), bitsandbytes' AdamW8bit, or the class of the settings.

    Args:
        learning_rate: after `scale_lr`.
        fused: whether one kernel updates all parameters, if the class has one; not with fp16's loss scaler: a fused
            optimizer hides its skipped updates from accelerate. On a GPU AdamW is then a few kernels (foreach).

    Raises:
        UserError: if bitsandbytes is asked for and missing, or the class or its arguments cannot be used.
    """
    arguments = arguments_of(optim)
    if arguments.get("fused") and not fused:
        raise UserError("--optimizer_args: fused hides the updates that fp16's loss scaler skips; leave it out")
    chosen = "fused" in arguments or "foreach" in arguments
    if optim.optimizer != ADAMW:
        device = parameters[0].device
        try_optimizer(optim, device)
        is_fused = fused and not chosen and fuses(optim, device)
        return new_optimizer(parameters, optim, learning_rate, **({"fused": True} if is_fused else {}))
    options: dict[str, Any] = {
        "betas": (optim.adam_beta1, optim.adam_beta2),
        "weight_decay": optim.adam_weight_decay,
        "eps": optim.adam_epsilon,
    }
    if not optim.use_8bit_adam and not chosen:
        options |= {"fused": fused, "foreach": not fused and parameters[0].is_cuda}
    return new_optimizer(parameters, optim, learning_rate, **options)


def build_lr_scheduler(
    optim: OptimConfig, optimizer: torch.optim.Optimizer, total_updates: int, updates_done: int = 0
) -> LRScheduler:
    """Build one of diffusers' six schedules, stepped once per optimizer update; it continues after `updates_done`."""
    from diffusers.optimization import get_scheduler

    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return get_scheduler(
        optim.lr_scheduler,
        optimizer=optimizer,
        num_warmup_steps=optim.lr_warmup_steps,
        num_training_steps=total_updates,
        num_cycles=optim.lr_num_cycles,
        power=optim.lr_power,
        last_epoch=updates_done - 1,
    )
