"""The settings of `raycontrolnet check`, besides those of the run that it predicts."""

from __future__ import annotations

from dataclasses import dataclass

from raycontrolnet.config.rules import Problems, above_zero
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.config.values import coerce_settings, setting_types
from raycontrolnet.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """Check: the device that the run is predicted for."""

    device_memory: float | None = None
    """Memory of a GPU in GiB, or with --use_gpu False of a machine; by default that of the GPU here, or else of this
    machine."""
    device_tflops: float | None = None
    """Peak TFLOP/s of a GPU in the run's precision, by its data sheet (dense); by default those of the GPU here."""
    price_per_hour: float | None = None
    """Price of one GPU for an hour, in any currency."""

    def problems(self) -> Problems:
        yield from above_zero(self, *setting_types(CheckSettings))


@dataclass(frozen=True, kw_only=True)
class CheckConfig(CheckSettings):
    """All settings of a prediction: its own, and those of the run.

    Raises:
        ConfigError: with every problem at once, each naming the flag, the value and the fix.
    """

    train: TrainConfig

    def __post_init__(self) -> None:
        if problems := coerce_settings(self, setting_types(CheckSettings)) or list(self.problems()):
            raise ConfigError(problems)
