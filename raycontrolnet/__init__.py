"""raycontrolnet: the ControlNet trainer for Ray."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "ConditionConfig",
    "ConditionResult",
    "GenerateConfig",
    "PairImages",
    "PrepareResult",
    "RunResult",
    "SweepConfig",
    "SweepResult",
    "TrainConfig",
    "condition",
    "control_fidelity",
    "fit",
    "generate",
    "prepare",
    "sweep",
]

if TYPE_CHECKING:
    from raycontrolnet.condition_images import ConditionResult, condition
    from raycontrolnet.condition_settings import ConditionConfig
    from raycontrolnet.config import TrainConfig
    from raycontrolnet.generate_images import generate
    from raycontrolnet.generate_settings import GenerateConfig
    from raycontrolnet.prepare_latents import PrepareResult, prepare
    from raycontrolnet.run.fidelity import control_fidelity
    from raycontrolnet.run.images import PairImages
    from raycontrolnet.train import RunResult, fit
    from raycontrolnet.tune.settings import SweepConfig
    from raycontrolnet.tune.sweep import SweepResult, sweep

_MODULES = {
    "ConditionConfig": "condition_settings",
    "ConditionResult": "condition_images",
    "GenerateConfig": "generate_settings",
    "PairImages": "run.images",
    "PrepareResult": "prepare_latents",
    "RunResult": "train",
    "SweepConfig": "tune.settings",
    "SweepResult": "tune.sweep",
    "TrainConfig": "config",
    "condition": "condition_images",
    "control_fidelity": "run.fidelity",
    "fit": "train",
    "generate": "generate_images",
    "prepare": "prepare_latents",
    "sweep": "tune.sweep",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `raycontrolnet --help` must not wait for torch and Ray."""
    if name in _MODULES:
        return getattr(import_module(f"raycontrolnet.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
