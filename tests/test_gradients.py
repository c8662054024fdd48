"""Gradients averaged over workers by `GradientAverage`: the bits of DDP, with graphs and without, in two processes."""

from __future__ import annotations

import gc
import json
import os
import weakref
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from captures import Captures
from reference import fake_rows, steps, write_trained_controlnet
from torch.multiprocessing.spawn import spawn

from raycontrolnet import TrainConfig
from raycontrolnet.model import gradients, graphs
from raycontrolnet.model.gradients import GradientAverage
from raycontrolnet.model.step import TrainState
from raycontrolnet.training import state as states
from raycontrolnet.training.schedule import Schedule, Share
from raycontrolnet.training.state import accelerator_for, build_state

Settings = dict[str, Any]
CASES: dict[str, Settings] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "set_grads_to_none": True},
    "bf16": {"mixed_precision": "bf16", "gradient_checkpointing": True, "use_ema": True},
    "elastic": {"num_workers": "1:3"},
    "set to none": {"set_grads_to_none": True, "optimizer": "torch.optim.RAdam"},
}
WAYS = ("DDP", "graphs", "given up")


class Events:
    """Events that tell when they are recorded: in order, of all buckets."""

    def __init__(self) -> None:
        self.recorded: list[int] = []

    def of(self, state: TrainState) -> None:
        assert state.gradient_average
        for number, bucket in enumerate(state.gradient_average._buckets):
            bucket.computed = _Numbered(self, number)  # type: ignore[assignment]  # on a CPU nobody waits for it


class _Numbered:
    def __init__(self, events: Events, number: int) -> None:
        self.events, self.number = events, number

    def record(self) -> None:
        self.events.recorded.append(self.number)


def in_group(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)


def updates(state: TrainState, rank: int, plan: Schedule) -> Iterator[Any]:
    """Do four updates as one worker of two, which deal an update's micro-batches among them."""
    share, micro_step = Share(rank, 2, plan.micro_batches), 0
    for update in range(4):
        state.begin_update(share.micro_steps(update))
        for _ in range(share.micro_steps(update)):
            first = share.place(micro_step) * plan.batch_size
            yield from steps(state, fake_rows(first, first + 1), weight=share.weight(update))
            micro_step += 1


def trained(settings: Settings, rank: int, way: str) -> dict[str, Any]:
    """Train as one worker of two, and return all that came of it."""
    captures, config = Captures(), TrainConfig(**settings)
    with pytest.MonkeyPatch.context() as patch, accelerator_for(config, use_gpu=False, world_size=2) as accelerator:
        patch.setattr(graphs, "capture", captures)
        patch.setattr(graphs, "free_bytes", lambda _: 2**40 if way == "graphs" else 0)
        patch.setattr(gradients, "BUCKET_BYTES", 2**16)
        if way != "DDP":
            patch.setattr(states, "_graphs", lambda weights, *_: captures.graphs(weights))
        plan = Schedule.of(config, 24, config.most_workers)
        state = build_state(config, plan, accelerator, None, None)
        assert (state.gradient_average is None) == (way == "DDP")
        if state.gradient_average:
            assert len(state.gradient_average._buckets) > 5
        taken = list(updates(state, rank, plan))
        together = torch.cat([value.detach().flatten() for value in state.components.controlnet.parameters()])
        if way == "graphs":
            assert captures.replayed >= len(taken) - 3, "all but the first of each weight and number"
        return {
            "losses": [float(each.loss) for each in taken],
            "norms": [float(each.grad_norm) for each in taken if each.grad_norm is not None],
            "weights": sha256(together.numpy().tobytes()).hexdigest(),
        }


def train_all(rank: int, folder: str, settings: Settings) -> None:
    in_group(rank, folder)
    found = {case: {way: trained(settings | more, rank, way) for way in WAYS} for case, more in CASES.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture
def settings(tiny_base: Path, tmp_path: Path, tiny_settings: Settings) -> Settings:
    controlnet = write_trained_controlnet(tiny_base, tmp_path / "controlnet")
    more = {
        "controlnet_model_name_or_path": str(controlnet),
        "learning_rate": 1e-3,
        "train_batch_size": 2,
        "num_workers": "2",
    }
    return tiny_settings | more


def test_the_bits_are_those_of_ddp(settings: Settings, tmp_path: Path) -> None:
    spawn(train_all, (str(tmp_path), settings), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for case, ways in first.items():
        for way, found in ways.items():
            assert found == ways["DDP"], (case, way)
            assert second[case][way] == second[case]["DDP"], (case, way)
            assert found["weights"] == second[case][way]["weights"], (case, way)
            assert found["norms"] == second[case][way]["norms"]
            assert found["losses"] != second[case][way]["losses"], "of other images"
    assert len({ways["DDP"]["weights"] for ways in first.values()}) == len(CASES)


def start_apart(rank: int, folder: str, settings: Settings) -> None:
    in_group(rank, folder)
    weights = [torch.nn.Parameter(torch.full((3,), float(rank + 1))), torch.nn.Parameter(torch.ones(2))]
    GradientAverage(weights)
    Path(folder, f"{rank}.json").write_text(json.dumps([weight.tolist() for weight in weights]))
    torch.distributed.destroy_process_group()


def test_workers_start_with_the_weights_of_the_first(tmp_path: Path) -> None:
    spawn(start_apart, (str(tmp_path), {}), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second == [[1.0, 1.0, 1.0], [1.0, 1.0]]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Give a process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 2**16)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_the_device_is_told_while_the_backward_pass_goes_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each bucket once a pass, the last weights' first; that of a weight without a gradient at the end."""
    captures, events = Captures(), Events()
    monkeypatch.setattr(graphs, "capture", captures)
    monkeypatch.setattr(graphs, "free_bytes", lambda _: 2**40)
    config = TrainConfig(**settings)
    with accelerator_for(config, use_gpu=False) as accelerator:
        state = build_state(config, Schedule.of(config, 24, 1), accelerator, None, None)
        unused = torch.nn.Parameter(torch.ones(3))
        weights = [unused, *state.components.controlnet.parameters()]
        state.graphs, state.gradient_average = captures.graphs(weights), GradientAverage(weights)
        events.of(state)
        number = len(state.gradient_average._buckets)
        left = [-1]
        weights[1].register_post_accumulate_grad_hook(lambda _: left.append(number - len(events.recorded)))
        steps(state, fake_rows(0, 1))
    assert sorted(events.recorded) == list(range(number))
    assert events.recorded[-1] == number - 1, "that of the weight without"
    assert unused.grad is None
    assert 1 <= left[1] <= 3, "most were told before the last gradient was computed"


@pytest.mark.usefixtures("alone")
def test_weights_do_not_keep_their_average() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    average = weakref.ref(GradientAverage([weight]))
    gc.collect()
    assert average() is None
    weight.sum().backward()
    assert weight.grad is not None
