"""raycontrolnet: the ControlNet trainer for Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "ConditionConfig", "ConditionResult", "GenerateConfig", "PairImages", "PrepareResult", "RunResult", "TrainConfig",
    "condition", "fit", "generate", "prepare",
]  # fmt: skip

if TYPE_CHECKING:
    from raycontrolnet.condition_images import ConditionResult, condition
    from raycontrolnet.condition_settings import ConditionConfig
    from raycontrolnet.config import TrainConfig
    from raycontrolnet.generate_images import generate
    from raycontrolnet.generate_settings import GenerateConfig
    from raycontrolnet.prepare_latents import PrepareResult, prepare
    from raycontrolnet.run.images import PairImages
    from raycontrolnet.train import RunResult, fit


def __getattr__(name: str) -> Any:
    """Import on first use: `raycontrolnet --help` must not wait for torch and Ray."""
    if name == "TrainConfig":
        from raycontrolnet.config import TrainConfig

        return TrainConfig
    if name in ("fit", "RunResult"):
        from raycontrolnet import train

        return getattr(train, name)
    if name in ("prepare", "PrepareResult"):
        from raycontrolnet import prepare_latents

        return getattr(prepare_latents, name)
    if name == "ConditionConfig":
        from raycontrolnet.condition_settings import ConditionConfig

        return ConditionConfig
    if name in ("condition", "ConditionResult"):
        from raycontrolnet import condition_images

        return getattr(condition_images, name)
    if name == "GenerateConfig":
        from raycontrolnet.generate_settings import GenerateConfig

        return GenerateConfig
    if name == "generate":
        from raycontrolnet.generate_images import generate

        return generate
    if name == "PairImages":
        from raycontrolnet.run.images import PairImages

        return PairImages
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
