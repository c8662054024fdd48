"""The settings of the optimizer's class, and of averages of the weights. They are declared as in settings.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from raycontrolnet.config.declare import setting
from raycontrolnet.config.named_values import NamedValues, read_named_values
from raycontrolnet.config.rules import Problems, problem_of
from raycontrolnet.config.settings import OptimConfig

ADAMW = "torch.optim.AdamW"
ADAMW_8BIT = "bitsandbytes.optim.AdamW8bit"
"""The class of --use_8bit_adam."""
ADAM_FLAGS = ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
OPTIMIZER_SETTINGS = ("optimizer", "optimizer_args", "use_8bit_adam", *ADAM_FLAGS)
"""Settings of which one decides what another may be."""
FLAGS_OF_ADAMW = {
    "betas": "--adam_beta1 and --adam_beta2", "weight_decay": "--adam_weight_decay", "eps": "--adam_epsilon",
}  # fmt: skip
"""Arguments of AdamW that have flags."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Algorithm: the optimizer's class and its arguments."""

    optimizer: str = setting(ADAMW, sweepable=True)
    """Optimizer as MODULE.CLASS, of PyTorch, bitsandbytes or any installed package, such as torch.optim.RAdam."""
    optimizer_args: NamedValues | None = setting(  # noqa: RUF009 (a text)
        None, sweepable=True, may_be_empty=True
    )
    """Its arguments besides lr, as weight_decay=0.1 betas=[0.9,0.99]; in a file also a mapping."""

    def problems(self) -> Problems:
        yield from _optimizer_problems(self)


def _optimizer_problems(config: Any) -> Problems:
    """Check the settings of the class, beside those of AdamW."""
    name, is_adamw = config.optimizer, config.optimizer == ADAMW
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        yield problem_of(config, "optimizer", "must be MODULE.CLASS, such as torch.optim.RAdam")
        return
    if config.use_8bit_adam and not is_adamw:
        yield f"--use_8bit_adam, --optimizer={name}: are two optimizers; leave out one"
    for flag in ADAM_FLAGS:
        if not is_adamw and getattr(config, flag) != getattr(OptimConfig, flag):
            yield problem_of(config, flag, f"is for AdamW; give {name} its arguments with --optimizer_args")
    flags = {"lr": "--learning_rate", "params": "", **(FLAGS_OF_ADAMW if is_adamw else {})}
    for argument in read_named_values(config.optimizer_args or ""):
        if argument in flags:
            instead = f"give it with {flags[argument]}"
            if argument == "params":
                instead = "leave it out; it is the ControlNet's weights"
            yield problem_of(config, "optimizer_args", f"{argument}: {instead}")


@dataclass(frozen=True, kw_only=True)
class AveragesConfig:
    """Averages: an average of the weights over the updates (EMA)."""

    use_ema: bool = setting(False, sweepable=True)
    """Average the ControlNet's weights over the updates; the averages are measured, drawn with and exported."""
    ema_decay: float = setting(0.9999, sweepable=True)
    """Largest decay of the averages of --use_ema, in [0, 1); after update n it is at most n / (n + 9)."""

    def problems(self) -> Problems:
        if not 0 <= self.ema_decay < 1:
            yield problem_of(self, "ema_decay", "must be in [0, 1)")
