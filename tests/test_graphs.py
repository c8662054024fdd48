"""CUDA graphs of the step: the same bits as without, whatever comes between. They are captured on a GPU (tests/gpu).

Here a stand-in does the function again, and checks the places that a graph would keep.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from bucket_data import write_pictures
from captures import Captures
from reference import fake_rows, steps, training, write_trained_controlnet
from runs import run

from raycontrolnet import TrainConfig, fit
from raycontrolnet.config.output_settings import WEIGHTS_FILE
from raycontrolnet.errors import RunError
from raycontrolnet.model import graphs
from raycontrolnet.model.graphs import GradientGraphs
from raycontrolnet.model.step import TrainState
from raycontrolnet.training import state as states

Settings = dict[str, Any]


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    found = Captures()
    monkeypatch.setattr(graphs, "capture", found)
    monkeypatch.setattr(graphs, "free_bytes", lambda _: 2**40)
    return found


@pytest.fixture
def settings(tiny_base: Path, tmp_path: Path, tiny_settings: Settings) -> Settings:
    controlnet = write_trained_controlnet(tiny_base, tmp_path / "controlnet")
    return tiny_settings | {"controlnet_model_name_or_path": str(controlnet), "learning_rate": 1e-3}


def results(
    settings: Settings, *batches: Any, by: Captures | None = None, between: Callable[[TrainState], None] | None = None
) -> Any:
    """Return losses and norms of the steps, and the weights after them; `between` is done before the fourth."""
    with training(settings) as state:
        if by:
            state.graphs = by.graphs(list(state.components.controlnet.parameters()))
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
    plain = results(settings, *batches)
    assert not captures.captured
    sizes = len({len(rows) for rows in batches})
    assert_same_bits(results(settings, *batches, by=captures), plain)
    assert captures.replayed == len(batches) - sizes, "all but the first of each size"
    assert captures.captured >= sizes


def test_other_numbers_than_tensors_have_graphs_of_their_own(settings: Settings, captures: Captures) -> None:
    with training(settings) as state:
        state.graphs = captures.graphs(list(state.components.controlnet.parameters()))
        rows = fake_rows(0, 1)
        for weight in (1.0, 0.5, 1.0, 0.5):
            steps(state, rows, weight=weight)
        assert (captures.captured, captures.replayed) == (2, 2)


def test_memory_is_given_back_while_the_step_rests(settings: Settings, captures: Captures) -> None:
    def rest(state: TrainState) -> None:
        assert state.graphs
        assert any(state.graphs._graphs.values())
        with state.paused():
            assert not any(state.graphs._graphs.values())

    plain = results(settings, *ONE_SIZE)
    assert_same_bits(results(settings, *ONE_SIZE, by=captures, between=rest), plain)
    assert (captures.captured, captures.replayed) == (2, 5), "again after the rest, at once"


@pytest.mark.parametrize("cause", ["out of memory", "little is left"])
def test_where_memory_is_short_the_run_goes_on_without(
    settings: Settings,
    captures: Captures,
    cause: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if cause == "out of memory":
        captures.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    else:
        monkeypatch.setattr(graphs, "free_bytes", lambda _: 1000)
    plain = results(settings, *ONE_SIZE)
    with caplog.at_level(logging.WARNING, "raycontrolnet"):
        assert_same_bits(results(settings, *ONE_SIZE, by=captures), plain)
    assert (captures.captured, captures.replayed) == (1, 0), "it is not tried again"
    said = "Tried to allocate 2 GiB" if cause == "out of memory" else "that an update needs would be left beside them"
    assert "training goes on without CUDA graphs" in caplog.text
    assert said in caplog.text


def test_a_step_that_cannot_be_captured_ends_the_run(settings: Settings, captures: Captures) -> None:
    """Torch's allocator stays in the capture."""
    captures.error = RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
    with pytest.raises(RunError, match=r"cannot be captured.*not permitted.*; add --cuda_graphs off"):
        results(settings, *ONE_SIZE, by=captures)


def test_weights_that_move_are_captured_again(settings: Settings, captures: Captures) -> None:
    def move(state: TrainState) -> None:
        for weight in state.components.controlnet.parameters():
            weight.data = weight.data.clone()

    plain = results(settings, *ONE_SIZE)
    assert_same_bits(results(settings, *ONE_SIZE, by=captures, between=move), plain)
    assert (captures.captured, captures.replayed) == (2, 5)


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
    plain = results(settings, *ONE_SIZE, between=spoil)
    assert_same_bits(results(settings, *ONE_SIZE, by=captures, between=spoil), plain)
    assert captures.replayed == 6


def test_weights_without_a_gradient_keep_none(settings: Settings, captures: Captures) -> None:
    """Else the optimizer would shrink them, by its weight decay."""
    with training(settings | {"adam_weight_decay": 0.1, "set_grads_to_none": True}) as state:
        unused = torch.nn.Parameter(torch.ones(3))
        state.components.controlnet.register_parameter("unused", unused)
        state.optimizer.param_groups[0]["params"].append(unused)
        state.graphs = captures.graphs(list(state.components.controlnet.parameters()))
        steps(state, *ONE_SIZE)
        assert captures.replayed == 5
        assert unused.grad is None
        assert torch.equal(unused, torch.ones(3))


def test_with_too_many_shapes_there_are_none(
    settings: Settings, captures: Captures, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 1)
    batches = [*ONE_SIZE[:3], fake_rows(20), *ONE_SIZE[3:]]
    plain = results(settings, *batches)
    assert_same_bits(results(settings, *batches, by=captures), plain)
    assert (captures.captured, captures.replayed) == (1, 2)
    assert caplog.text.count("batches have more than 1 shapes") == 1


def test_a_step_without_a_graph_has_their_memory(settings: Settings, captures: Captures) -> None:
    """Its activations and theirs would not fit together."""
    with training(settings) as state:
        state.graphs = captures.graphs(list(state.components.controlnet.parameters()))
        steps(state, *ONE_SIZE[:2])
        assert state.graphs
        assert any(state.graphs._graphs.values())
        steps(state, fake_rows(20))
        assert not any(state.graphs._graphs.values())


@pytest.fixture
def everywhere(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> Captures:
    """Give each run graphs, as on a GPU."""
    monkeypatch.setattr(states, "_graphs", lambda weights, *_: captures.graphs(weights))
    return captures


def weights_of(folder: Path) -> bytes:
    return (folder / WEIGHTS_FILE).read_bytes()


def test_a_run_that_measures_and_draws_ends_with_the_same_weights(
    validated_settings: Settings, tmp_path: Path, everywhere: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = validated_settings | {"max_train_steps": 6, "validation_split": 4, "use_ema": True}
    found = run(settings, tmp_path / "graphs")
    assert everywhere.captured == 3, "anew after each validation but the last"
    status = json.loads((found / "run.json").read_text())
    assert (status["cuda_graphs"], status["no_cuda_graphs_because"]) == (True, None)
    monkeypatch.undo()
    plain = run(settings, tmp_path / "plain")
    assert weights_of(found) == weights_of(plain)
    status = json.loads((plain / "run.json").read_text())
    assert (status["cuda_graphs"], status["no_cuda_graphs_because"]) == (False, "the run is on CPUs")


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
    ("changed", "device", "workers", "because"),
    [
        ({}, "cpu", 1, "the run is on CPUs"),
        ({}, "cuda", 2, "there are 2 workers; --cuda_graphs on takes them there too"),
        ({"cuda_graphs": "off"}, "cuda", 2, "--cuda_graphs off leaves them out"),
        ({"mixed_precision": "no"}, "cuda", 1, "they are for bf16 and fp16, and the run is in fp32"),
        ({"mixed_precision": "no"}, "cuda", 2, "they are for bf16 and fp16, and the run is in fp32"),
        ({"compile": True}, "cuda", 3, "--compile leaves them out"),
        (
            {"enable_xformers_memory_efficient_attention": True}, "cuda", 1,
            "--enable_xformers_memory_efficient_attention leaves them out",
        ),
    ],
)  # fmt: skip
def test_who_gets_graphs(
    changed: Settings, device: str, workers: int, because: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def graphs_of(changed: Settings, device: str, workers: int) -> GradientGraphs | None:
        settings: Settings = {"pretrained_model_name_or_path": "base", "train_data_dir": "data"}
        settings |= {"mixed_precision": "bf16"} | changed
        accelerator = cast(Any, SimpleNamespace(device=torch.device(device), num_processes=workers))
        return states._graphs([], TrainConfig(**settings), accelerator)

    assert graphs_of({}, "cuda", 1)
    assert graphs_of({"mixed_precision": "fp16"}, "cuda", 1)
    assert graphs_of({"cuda_graphs": "on"}, "cuda", 2)
    assert graphs_of(changed, device, workers) is None
    assert [record.getMessage() for record in caplog.records] == (
        [f"no CUDA graphs: {because}"] if device == "cuda" else []
    )
    settings: Settings = {"pretrained_model_name_or_path": "base", "train_data_dir": "data", "mixed_precision": "bf16"}
    config = TrainConfig(**settings | changed)
    assert graphs.graphs_used(None, config, on_gpu=device == "cuda", num_workers=workers) == {
        "cuda_graphs": False, "no_cuda_graphs_because": because,
    }  # fmt: skip


def test_run_json_says_why_graphs_ended() -> None:
    config = TrainConfig(pretrained_model_name_or_path="base", train_data_dir="data")
    for replayed, problem, because in (
        (True, None, None),
        (False, None, "no two batches of one shape were trained"),
        (False, "memory is short", "memory is short"),
        (True, "batches have more than 32 shapes", "batches have more than 32 shapes"),
    ):
        found = GradientGraphs([], problem=problem, replayed=replayed)
        used = graphs.graphs_used(found, config, on_gpu=True, num_workers=1)
        assert used == {"cuda_graphs": replayed, "no_cuda_graphs_because": because}


def test_graphs_that_are_asked_for_in_vain_are_told_of(tiny_settings: Settings, tmp_path: Path) -> None:
    stream = io.StringIO()
    settings = tiny_settings | {"max_train_steps": 1, "cuda_graphs": "on", "output_dir": str(tmp_path / "out")}
    fit(TrainConfig(**settings), stream=stream)
    assert "--cuda_graphs on: has no effect; the run is on CPUs\n" in stream.getvalue()
