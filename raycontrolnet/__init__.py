"""raycontrolnet: the ControlNet trainer for Ray."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raycontrolnet.version import __version__

__all__ = [
    "CheckConfig",
    "ConditionConfig",
    "ConditionResult",
    "GenerateConfig",
    "PairImages",
    "PrepareResult",
    "RunResult",
    "SweepConfig",
    "SweepResult",
    "TrainConfig",
    "__version__",
    "check",
    "condition",
    "control_fidelity",
    "fit",
    "generate",
    "prepare",
    "sweep",
]

if TYPE_CHECKING:
    from raycontrolnet.conditions.condition import ConditionResult, condition
    from raycontrolnet.config.check_config import CheckConfig
    from raycontrolnet.config.condition_config import ConditionConfig
    from raycontrolnet.config.generate_config import GenerateConfig
    from raycontrolnet.config.sweep_config import SweepConfig
    from raycontrolnet.config.train_config import TrainConfig
    from raycontrolnet.latents.prepare import PrepareResult, prepare
    from raycontrolnet.launch.check import check
    from raycontrolnet.launch.fit import RunResult, fit
    from raycontrolnet.sampling.fidelity import control_fidelity
    from raycontrolnet.sampling.generate import generate
    from raycontrolnet.sampling.images import PairImages
    from raycontrolnet.tune.sweep import SweepResult, sweep

_MODULES = {
    "CheckConfig": "config.check_config",
    "ConditionConfig": "config.condition_config",
    "ConditionResult": "conditions.condition",
    "GenerateConfig": "config.generate_config",
    "PairImages": "sampling.images",
    "PrepareResult": "latents.prepare",
    "RunResult": "launch.fit",
    "SweepConfig": "config.sweep_config",
    "SweepResult": "tune.sweep",
    "TrainConfig": "config.train_config",
    "check": "launch.check",
    "condition": "conditions.condition",
    "control_fidelity": "sampling.fidelity",
    "fit": "launch.fit",
    "generate": "sampling.generate",
    "prepare": "latents.prepare",
    "sweep": "tune.sweep",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `raycontrolnet --help` must not wait for torch and Ray."""
    if name in _MODULES:
        return getattr(import_module(f"raycontrolnet.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
