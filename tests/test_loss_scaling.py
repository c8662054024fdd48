"""fp16 with its loss scaler, as on a GPU: the CPU has both, though accelerate and this program leave them to GPUs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from reference import fake_rows, save_state, steps, training, write_trained_controlnet
from torch import Tensor

from raycontrolnet import TrainConfig
from raycontrolnet.model.step import TrainState
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.training.schedule import Schedule
from raycontrolnet.training.state import accelerator_for, build_state

FIRST_SCALE = 2.0**10
"""The scaler begins with 2**16, which overflows once or twice in any run."""


@pytest.fixture(autouse=True)
def _fp16_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let accelerate do on the CPU what it does on a GPU."""
    original = Accelerator.__init__

    def init(self: Accelerator, *args: Any, mixed_precision: str, **options: Any) -> None:
        original(self, *args, mixed_precision="no", **options)
        if mixed_precision == "fp16":
            self.state._mixed_precision = "fp16"
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=3)

    monkeypatch.setattr(Accelerator, "__init__", init)


@pytest.fixture
def settings(tiny_base: Path, tmp_path: Path, tiny_settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run in fp16 that continues from a ControlNet that was trained a bit."""
    controlnet = write_trained_controlnet(tiny_base, tmp_path / "controlnet")
    changed = {"controlnet_model_name_or_path": str(controlnet), "mixed_precision": "fp16", "train_batch_size": 2}
    return tiny_settings | changed | {"lr_scheduler": "linear", "lr_warmup_steps": 2, "max_train_steps": 10}


def batches(number: int, first: int = 0) -> list[Any]:
    return [fake_rows(2 * index, 2 * index + 1) for index in range(first, first + number)]


def weights(state: TrainState) -> list[Tensor]:
    return [value.detach().clone() for value in state.components.controlnet.parameters()]


def moments(state: TrainState) -> list[Tensor]:
    return [value.clone() for of in state.optimizer.state.values() for value in (of["exp_avg"], of["exp_avg_sq"])]


def scale(state: TrainState) -> float:
    assert state.accelerator.scaler is not None
    return float(state.accelerator.scaler.get_scale())


@pytest.fixture
def overflows() -> Iterator[Callable[[TrainState], None]]:
    """Return what plants an infinity in the gradients of a state, until the end of the test or `remove`."""
    handles = []

    def plant(state: TrainState) -> Any:
        weight = next(state.components.controlnet.parameters())
        handles.append(weight.register_hook(lambda gradient: gradient * torch.inf))
        return handles[-1]

    yield plant
    for handle in handles:
        handle.remove()


def test_it_learns_as_in_fp32(settings: dict[str, Any]) -> None:
    """Losses and norms of gradients, which are those before scaling, to what fp16 holds."""
    found = []
    for precision in ("no", "fp16"):
        with training(settings | {"mixed_precision": precision}) as state:
            results = steps(state, *batches(4))
            found.append([(float(result.loss), float(result.grad_norm)) for result in results])
            assert {value.dtype for value in weights(state)} == {torch.float32}
            assert state.components.denoiser.dtype == (torch.float16 if precision == "fp16" else torch.float32)
    (exact, rounded) = (list(itertools.chain(*each)) for each in found)
    assert rounded == pytest.approx(exact, rel=0.01)
    assert rounded != exact


def test_an_update_that_overflows_is_skipped(settings: dict[str, Any], overflows: Callable[[TrainState], Any]) -> None:
    """Weights, moments and schedule wait; updates and samples count; the scale is halved, and training goes on."""
    with training(settings | {"use_ema": True}) as state:
        assert state.averages
        steps(state, *batches(1))
        averages = [value.clone() for value in state.averages.shadow_params]
        before, moments_before, lr = weights(state), moments(state), state.lr_scheduler.get_last_lr()
        planted = overflows(state)
        (skipped,) = steps(state, *batches(1, first=1))
        planted.remove()
        assert float(skipped.grad_norm) == 0
        assert all(map(torch.equal, weights(state), before))
        assert all(map(torch.equal, moments(state), moments_before))
        assert state.lr_scheduler.get_last_lr() == lr
        assert (state.averages.optimization_step, state.step, state.samples) == (1, 2, 4)
        assert all(map(torch.equal, state.averages.shadow_params, averages))
        assert scale(state) == FIRST_SCALE / 2
        (taken,) = steps(state, *batches(1, first=2))
        assert (float(taken.grad_norm) > 0, taken.lr) == (True, lr[0])
        assert not all(map(torch.equal, weights(state), before))


def test_an_overflow_within_an_accumulation_skips_the_whole_update(
    settings: dict[str, Any], overflows: Callable[[TrainState], Any]
) -> None:
    with training(settings | {"gradient_accumulation_steps": 2, "lr_warmup_steps": 0}) as state:
        before = weights(state)
        planted = overflows(state)
        steps(state, *batches(1))
        planted.remove()
        steps(state, *batches(1, first=1))
        assert all(map(torch.equal, weights(state), before))
        assert (state.step, state.samples, scale(state)) == (1, 4, FIRST_SCALE / 2)
        steps(state, *batches(2, first=2))
        assert not all(map(torch.equal, weights(state), before))


def test_a_resumed_run_has_the_scale_and_goes_on_exactly(
    settings: dict[str, Any], overflows: Callable[[TrainState], Any], tmp_path: Path
) -> None:
    """Two updates after an overflow: one more, and the scale grows. The schedule counts one update less."""
    config = TrainConfig(**settings)
    with training(settings) as state:
        planted = overflows(state)
        steps(state, *batches(1))
        planted.remove()
        steps(state, *batches(2, first=1))
        checkpoint = checkpoints.write(
            tmp_path, step=state.step, samples=state.samples, seed=0, run_id="scaled", facts={},
            save=lambda folder: save_state(state, folder),
        )  # fmt: skip
        straight = steps(state, *batches(2, first=3))
        assert scale(state) == FIRST_SCALE
        expected = weights(state)
    with accelerator_for(config, use_gpu=False) as accelerator:
        resumed = build_state(config, Schedule.of(config, 13, 1), accelerator, checkpoint, None)
        assert (resumed.step, resumed.samples, scale(resumed)) == (3, 6, FIRST_SCALE / 2)
        again = steps(resumed, *batches(2, first=3))
        assert scale(resumed) == FIRST_SCALE
        assert [(float(each.loss), float(each.grad_norm), each.lr) for each in again] == [
            (float(each.loss), float(each.grad_norm), each.lr) for each in straight
        ]
        assert all(map(torch.equal, weights(resumed), expected))
