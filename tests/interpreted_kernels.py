"""Print as JSON how far the kernels are off PyTorch's layers: run by a test in a process of Triton's interpreter.

TRITON_INTERPRET=1 PYTHONPATH=.:tests python tests/interpreted_kernels.py BASE DATA
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from reference import fake_rows, steps, training

from raycontrolnet.model.fused.layers import TRIED, fuse_layers, fused_class, problem_of_kernels
from raycontrolnet.model.fused.trials import Trial, trials, with_gradients

CPU = torch.device("cpu")
WIDE = (1, 1280, 2, 3)
"""Shape of images whose groups have more channels than a program of a group holds by default."""


def differences() -> Iterator[tuple[str, float]]:
    """Yield each layer, with or without autocast, and the largest share by which it is off PyTorch's in fp32."""
    for shape in (TRIED, WIDE):
        for trial in trials(shape):
            yield f"{type(trial.layer).__name__} of {shape}", _off(trial, autocast=False)
            yield f"{type(trial.layer).__name__} of {shape} under autocast", _off(trial, autocast=True)


def losses(base: str, data: str, *, fused: bool) -> list[float]:
    """Return losses and gradient norms of two updates."""
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": base, "train_data_dir": data, "resolution": 32, "train_batch_size": 2,
        "learning_rate": 1e-3, "mixed_precision": "bf16", "seed": 0, "max_train_steps": 4,
    }  # fmt: skip
    with training(settings) as state:
        state.components.controlnet.to(memory_format=torch.channels_last)
        if fused:
            fuse_layers(state.components)
        taken = steps(state, fake_rows(0, 1), fake_rows(2, 3))
        return [float(value) for step in taken for value in (step.loss, step.grad_norm)]


def _off(trial: Trial, *, autocast: bool) -> float:
    """Compare a layer with fp32 weights; under autocast its values are bf16."""
    plain, inputs = trial.to(CPU, torch.float32, torch.bfloat16 if autocast else torch.float32)
    expected = with_gradients(plain, *(each.float() for each in inputs))
    layer = copy.deepcopy(plain)
    layer.__class__ = fused_class(layer) or layer.__class__
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = with_gradients(layer, *inputs)
    return max(float((one - other.float()).norm() / one.norm()) for one, other in zip(expected, found, strict=True))


if __name__ == "__main__":
    dtypes = torch.float32, torch.bfloat16, torch.float16
    print(
        json.dumps(
            {
                "trials": {str(dtype): problem_of_kernels(CPU, dtype) for dtype in dtypes},
                "differences": dict(differences()),
                "plain": losses(*sys.argv[1:], fused=False),
                "fused": losses(*sys.argv[1:], fused=True),
            }
        )
    )
