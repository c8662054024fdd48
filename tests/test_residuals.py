"""A ControlNet's residuals go to the denoiser as they are: by the same bits, in fewer passes over them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from fused_stand_ins import Calls
from reference import fake_rows, steps, training

from raycontrolnet.model.performance import working_precision


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_residuals_are_neither_cast_nor_multiplied_by_one(
    mixed_precision: str, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate brings them to fp32, and diffusers' scale of 1 copies them."""

    def run() -> tuple[list[float], Counter[torch.dtype], Counter[str]]:
        dtypes = Counter[torch.dtype]()
        with training(tiny_settings | {"mixed_precision": mixed_precision}) as state, Calls() as calls:
            state.components.controlnet.register_forward_hook(
                lambda _module, _args, output: dtypes.update(each.dtype for each in (*output[0], output[1]))
            )
            taken = steps(state, fake_rows(0, 1), fake_rows(2, 3))
            return [float(value) for step in taken for value in (step.loss, step.grad_norm)], dtypes, calls.found

    found, dtypes, calls = run()
    monkeypatch.setattr("raycontrolnet.training.state._in_half_precision", lambda forward, _: forward.__self__.forward)
    monkeypatch.setattr("raycontrolnet.model.families.unet.Unscaled", lambda: 1.0)
    expected, of_accelerate, others = run()
    assert found == expected
    assert set(dtypes) == {working_precision(mixed_precision)}
    assert set(of_accelerate) == {torch.float32}
    residuals = sum(dtypes.values())
    assert others["mul"] - calls["mul"] == 2 * residuals, "forward and backward"
    if mixed_precision == "bf16":
        assert others["_to_copy"] - calls["_to_copy"] == 4 * residuals, "there and back, forward and backward"
