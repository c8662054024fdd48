"""Sweeps on Ray Tune: many runs of the same `fit`, sharing everything that does not differ.

`trainable` makes a run a trial of anybody's own `ray.tune.Tuner`; `checkpoint_folder` leads from its result to weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["checkpoint_folder", "trainable"]

if TYPE_CHECKING:
    from raycontrolnet.tune.trial_function import checkpoint_folder, trainable


def __getattr__(name: str) -> Any:
    """Import on first use: `raycontrolnet --help` must not wait for Ray."""
    if name in __all__:
        from raycontrolnet.tune import trial_function

        return getattr(trial_function, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
