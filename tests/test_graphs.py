"""CUDA graphs of the step: the same bits as without, whatever comes between. They are captured on a GPU (tests/gpu).

Here a stand-in keeps what a graph keeps, the function and the places it reads and writes, and does it on the CPU.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from bucket_data import write_pictures
from reference import fake_rows, steps, training, write_trained_controlnet
from runs import run
from torch import Tensor

from raycontrolnet import TrainConfig
from raycontrolnet.config.output_settings import WEIGHTS_FILE
from raycontrolnet.model import graphs
from raycontrolnet.model.graphs import GradientGraphs
from raycontrolnet.model.step import TrainState
from raycontrolnet.training import state as states

Settings = dict[str, Any]


class Captures:
    """Stand-in of `capture`, which counts."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0
        self.fails = False

    def __call__(self, function: Callable[[], Tensor], _pool: Any) -> tuple[Callable[[], None], Tensor]:
        self.captured += 1
        if self.fails:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        loss = torch.full((), torch.nan)

        def replay() -> None:
            self.replayed += 1
            loss.copy_(function())

        return replay, loss


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    found = Captures()
    monkeypatch.setattr(graphs, "capture", found)
    return found


@pytest.fixture
def settings(tiny_base: Path, tmp_path: Path, tiny_settings: Settings) -> Settings:
    controlnet = write_trained_controlnet(tiny_base, tmp_path / "controlnet")
    return tiny_settings | {"controlnet_model_name_or_path": str(controlnet), "learning_rate": 1e-3}


def with_graphs(state: TrainState) -> None:
    weights = list(state.components.controlnet.parameters())
    state.graphs = GradientGraphs(weights)


def results(
    settings: Settings, *batches: Any, graphed: bool, between: Callable[[TrainState], None] | None = None
) -> Any:
    """Return losses and norms of the steps, and the weights after them; `between` is done before the fourth."""
    with training(settings) as state:
        if graphed:
            with_graphs(state)
        taken = steps(state, *batches[:3])
        if between:
            between(state)
        taken += steps(state, *batches[3:])
        figures = [(float(step.loss), None if step.grad_norm is None else float(step.grad_norm)) for step in taken]
        return figures, [weight.detach().clone() for weight in state.components.controlnet.parameters()]


def assert_same_bits(one: Any, other: Any) -> None:
    assert one[0] == other[0]
    assert all(map(torch.equal, one[1], other[1]))


ONE_SIZE = [fake_rows(2 * index, 2 * index + 1) for index in range(6)]
TWO_SIZES = [fake_rows(index) if index % 3 else fake_rows(index, index + 1) for index in range(9)]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"set_grads_to_none": True},
        {"gradient_accumulation_steps": 2, "set_grads_to_none": True},
        {"gradient_accumulation_steps": 3, "mixed_precision": "bf16", "optimizer": "torch.optim.RAdam"},
        {"gradient_checkpointing": True, "use_ema": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("batches", [ONE_SIZE, TWO_SIZES], ids=["one size", "two sizes"])
def test_the_bits_are_those_without(
    settings: Settings, captures: Captures, changed: Settings, batches: list[Any]
) -> None:
    settings |= changed
    plain = results(settings, *batches, graphed=False)
    assert not captures.captured
    sizes = len({len(rows) for rows in batches})
    assert_same_bits(results(settings, *batches, graphed=True), plain)
    assert captures.replayed == len(batches) - sizes, "all but the first of each size"
    assert captures.captured >= sizes


def test_other_numbers_than_tensors_have_graphs_of_their_own(settings: Settings, captures: Captures) -> None:
    with training(settings) as state:
        with_graphs(state)
        rows = fake_rows(0, 1)
        for weight in (1.0, 0.5, 1.0, 0.5):
            before = captures.captured
            steps(state, rows, weight=weight)
        assert captures.captured == 2 > before


def test_memory_is_given_back_while_the_step_rests(settings: Settings, captures: Captures) -> None:
    def rest(state: TrainState) -> None:
        assert state.graphs
        assert any(state.graphs._graphs.values())
        with state.at_rest():
            assert not any(state.graphs._graphs.values())

    plain = results(settings, *ONE_SIZE, graphed=False)
    assert_same_bits(results(settings, *ONE_SIZE, graphed=True, between=rest), plain)
    assert (captures.captured, captures.replayed) == (2, 5), "again after the rest, at once"


def test_a_step_that_cannot_be_captured_runs_without(
    settings: Settings, captures: Captures, caplog: pytest.LogCaptureFixture
) -> None:
    captures.fails = True
    plain = results(settings, *ONE_SIZE, graphed=False)
    with caplog.at_level(logging.WARNING, "raycontrolnet"):
        assert_same_bits(results(settings, *ONE_SIZE, graphed=True), plain)
    assert captures.captured == 1, "it is not tried again"
    assert "goes on without CUDA graphs" in caplog.text
    assert "operation not permitted when stream is capturing" in caplog.text


def test_an_update_that_is_not_finite_leaves_the_next_ones_alone(settings: Settings, captures: Captures) -> None:
    """Optimizers that are not fused drop the gradients; they are found again."""

    def spoil(state: TrainState) -> None:
        weight = state.components.controlnet.conv_in.weight
        handle = weight.register_hook(lambda gradient: gradient * torch.nan)
        before = weight.detach().clone()
        (taken,) = steps(state, fake_rows(20, 21))
        handle.remove()
        assert not torch.isfinite(taken.grad_norm)
        assert torch.equal(weight, before)

    settings |= {"optimizer": "torch.optim.RAdam"}
    plain = results(settings, *ONE_SIZE, graphed=False, between=spoil)
    assert_same_bits(results(settings, *ONE_SIZE, graphed=True, between=spoil), plain)
    assert captures.replayed == 6


def test_weights_without_a_gradient_keep_none(settings: Settings, captures: Captures) -> None:
    """Else the optimizer would shrink them, by its weight decay."""
    with training(settings | {"adam_weight_decay": 0.1, "set_grads_to_none": True}) as state:
        unused = torch.nn.Parameter(torch.ones(3))
        state.components.controlnet.register_parameter("unused", unused)
        state.optimizer.param_groups[0]["params"].append(unused)
        with_graphs(state)
        steps(state, *ONE_SIZE)
        assert captures.replayed == 5
        assert unused.grad is None
        assert torch.equal(unused, torch.ones(3))


def test_with_too_many_shapes_there_are_none(
    settings: Settings, captures: Captures, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    batches = [*ONE_SIZE[:3], fake_rows(20), *ONE_SIZE[3:]]
    plain = results(settings, *batches, graphed=False)
    assert_same_bits(results(settings, *batches, graphed=True), plain)
    assert (captures.captured, captures.replayed) == (1, 2)
    assert caplog.text.count("batches have more than 1 shapes") == 1


def test_a_step_without_a_graph_has_their_memory(settings: Settings, captures: Captures) -> None:
    """Its activations and theirs would not fit together."""
    with training(settings) as state:
        with_graphs(state)
        steps(state, *ONE_SIZE[:2])
        assert state.graphs
        assert any(state.graphs._graphs.values())
        steps(state, fake_rows(20))
        assert not any(state.graphs._graphs.values())


@pytest.fixture
def everywhere(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Give each run graphs, as on a GPU."""
    monkeypatch.setattr(states, "_graphs", lambda weights, *_: GradientGraphs(weights))
    return captures


def weights_of(folder: Path) -> bytes:
    return (folder / WEIGHTS_FILE).read_bytes()


def test_a_run_that_measures_and_draws_ends_with_the_same_weights(
    validated_settings: Settings, tmp_path: Path, everywhere: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = validated_settings | {"max_train_steps": 6, "validation_split": 4, "use_ema": True}
    found = run(settings, tmp_path / "graphs")
    assert everywhere.captured == 3, "anew after each validation but the last"
    assert json.loads((found / "run.json").read_text())["cuda_graphs"] is True
    monkeypatch.undo()
    plain = run(settings, tmp_path / "plain")
    assert weights_of(found) == weights_of(plain)
    assert json.loads((plain / "run.json").read_text())["cuda_graphs"] is False


@pytest.mark.usefixtures("everywhere")
def test_a_run_goes_on_with_the_same_weights(tiny_settings: Settings, tmp_path: Path) -> None:
    settings = tiny_settings | {"checkpointing_steps": 3, "max_train_steps": 6, "mixed_precision": "bf16"}
    whole = run(settings, tmp_path / "whole")
    run(settings | {"max_train_steps": 3}, tmp_path / "parts")
    again = run(settings | {"resume_from_checkpoint": "latest"}, tmp_path / "parts")
    assert weights_of(again) == weights_of(whole)


def test_each_size_of_aspect_buckets_has_a_graph(
    tiny_settings: Settings, tmp_path: Path, everywhere: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_pictures(tmp_path / "data", 12, ((40, 40), (50, 30), (30, 50)))
    settings = tiny_settings | {"train_data_dir": str(data), "aspect_buckets": True, "max_train_steps": 9}
    found = run(settings, tmp_path / "graphs")
    assert everywhere.replayed == 6, "all but the first of each size"
    monkeypatch.undo()
    assert weights_of(run(settings, tmp_path / "plain")) == weights_of(found)


@pytest.mark.parametrize(
    ("device", "workers", "on", "expected"),
    [("cuda", 1, True, True), ("cuda", 1, False, False), ("cuda", 2, True, False), ("cpu", 1, True, False)],
)
def test_who_gets_graphs(device: str, workers: int, on: bool, expected: bool) -> None:
    config = TrainConfig(pretrained_model_name_or_path="base", train_data_dir="data", cuda_graphs=on)
    accelerator = cast(Any, SimpleNamespace(device=torch.device(device), num_processes=workers))
    assert (states._graphs([], config, accelerator) is not None) == expected
