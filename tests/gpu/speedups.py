"""Checks of what makes the step fast: CUDA graphs, fused layers and torch.compile leave its results as they are."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from correctness import CPU, SIZE, Result, compared, do_steps, gradients
from states import TINY_RESOLUTION, copied, draws_of, random_batch, settings, training
from torch import distributed
from torch.nn.attention import SDPBackend, sdpa_kernel

from raycontrolnet.model import gradients as gradients_of_workers
from raycontrolnet.model.components import Components
from raycontrolnet.model.gradients import GradientAverage
from raycontrolnet.model.graphs import GradientGraphs
from raycontrolnet.model.performance import fused_layers, tf32
from raycontrolnet.model.step import StepMetrics, TrainState, train_step

NORMS = ((4, 320, 64, 64), (2, 960, 24, 40), (3, 1280, 8, 8), (1, 80, 33, 31))
"""Shapes of images, [B, C, H, W]; with 16 groups."""
KINDS = {
    "fp32": (torch.float32, torch.float32, 1e-5, 1e-4),
    "bf16": (torch.bfloat16, torch.bfloat16, 1e-2, 3e-2),
    "autocast": (torch.bfloat16, torch.float32, 1e-2, 3e-2),
}
"""Kind of a comparison -> dtype of the layers' inputs and of their weights; largest difference by the norm of a layer,
and of a block of several."""


GRAPHED: dict[str, dict[str, Any]] = {
    "bf16": {"gradient_checkpointing": True},
    "fp16": {"gradient_accumulation_steps": 2, "set_grads_to_none": True},
    "no": {"optimizer": "torch.optim.RAdam"},
}
"""Precision -> other settings."""


def cuda_graphs(base: Components, device: torch.device) -> Result:
    """Train twice without graphs and once with them, in two sizes by turns, with a rest between: the same bits.

    Where two runs without differ (PyTorch's attention in fp32 need not repeat its gradients), one with graphs may
    differ about as much. cuDNN takes its algorithms without a trial, of which the outcome could differ.
    """
    off: dict[str, float] = {}
    ok, problems, replayed = True, [], []
    for precision, changes in GRAPHED.items():
        found = []
        for graphs in (False, False, True):
            config = settings(precision, learning_rate=1e-4, cuda_graphs="on" if graphs else "off", **changes)
            with training(copied(base, config, device), config) as state:
                torch.backends.cudnn.benchmark = False
                if graphs and state.graphs is None:  # in fp32, where runs have none until this has been shown
                    state.graphs = GradientGraphs(list(state.components.controlnet.parameters()))
                losses = [each.loss[None] for first in (0, 4) for each in _by_turns(state, first, device)]
                weights = [weight.detach().flatten() for weight in state.components.controlnet.parameters()]
                found.append(torch.cat([*losses, *weights]).double())
                if state.graphs:
                    replayed.append(state.graphs.replayed)
                    problems += [f"{precision}: {problem}"] if (problem := state.graphs.problem) else []
        first, second, graphed = found
        off[f"{precision}, repeated"], off[f"{precision}, by graphs"] = (
            float((first - other).norm() / first.norm()) for other in (second, graphed)
        )
        ok &= off[f"{precision}, by graphs"] <= 3 * off[f"{precision}, repeated"]
    ok &= replayed == [True] * len(GRAPHED)
    return {**off, "problems": problems, "replayed": replayed, "ok": ok and not problems}


def _by_turns(state: TrainState, first: int, device: torch.device, weight: float = 1.0) -> Iterator[StepMetrics]:
    """Do four steps with batches of two sizes by turns, and rest."""
    for index in range(first, first + 4):
        size = SIZE + index % 2
        batch = random_batch(state.components, size, TINY_RESOLUTION, device, cached=False)
        yield train_step(state, batch, draws_of(state.components, 8 * index, size, TINY_RESOLUTION, device), weight)
    with state.paused():
        pass


def averaged_gradients(base: Components, device: torch.device) -> Result:
    """Train by graphs with and without an average over the workers, in many parts: the same bits.

    The group has one worker, which takes itself for the first of two that have no gradients: its doubled ones are
    halved, which changes no bit. One that is averaged before the graph has computed it is not halved.
    """
    found, before = [], (gradients_of_workers.BUCKET_BYTES, distributed.get_world_size)
    config = settings("bf16", learning_rate=1e-4, gradient_accumulation_steps=2, cuda_graphs="on")
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("nccl", init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            for averages in (False, True):
                with training(copied(base, config, device), config) as state:
                    torch.backends.cudnn.benchmark = False
                    weights = list(state.components.controlnet.parameters())
                    if averages:
                        gradients_of_workers.BUCKET_BYTES = 2**18
                        state.gradient_average = GradientAverage(weights)
                        distributed.get_world_size = lambda *_: 2
                    weight = 2.0 if averages else 1.0
                    losses = [each.loss[None] for first in (0, 4) for each in _by_turns(state, first, device, weight)]
                    found.append(torch.cat([*losses, *(each.detach().flatten() for each in weights)]))
                    replayed = state.graphs is not None and state.graphs.replayed
        finally:
            gradients_of_workers.BUCKET_BYTES, distributed.get_world_size = before
            distributed.destroy_process_group()
    off = float((found[0] - found[1]).norm() / found[0].norm())
    return {"off by": off, "by graphs": replayed, "ok": off == 0 and replayed}


def fused(base: Components, device: torch.device) -> Result:
    """Compare the fused layers' outputs and gradients with fp64's on the CPU, and with their own, bit for bit.

    Attention is computed step by step, which gives the same bits again.
    """
    from raycontrolnet.model.fused.layers import FUSED, fused_class
    from raycontrolnet.model.fused.trials import trials, with_gradients

    off: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    exact = close = True
    for shape, (kind, (values, weights, *limits)) in itertools.product(NORMS, KINDS.items()):
        for trial in trials(shape):
            given = trial.to(CPU, torch.bfloat16, values)  # weights that bf16 has too
            layer, inputs = copy.deepcopy(given).to(CPU, torch.float64, torch.float64)
            expected = with_gradients(layer, *inputs)
            layer, inputs = given.to(device, weights, values)
            cls = fused_class(layer)
            assert cls
            layer.__class__ = cls
            with (
                exact_convolutions(),
                sdpa_kernel(SDPBackend.MATH),
                torch.autocast(device.type, torch.bfloat16, enabled=kind == "autocast"),
            ):
                found, again = (with_gradients(layer, *inputs) for _ in range(2))
            exact &= all(map(torch.equal, found, again))
            pairs = zip(found, expected, strict=True)
            differences = [float((one.cpu().double() - other).norm() / other.norm()) for one, other in pairs]
            off[kind][cls.__name__] = max(off[kind].get(cls.__name__, 0.0), *differences)
            close &= max(differences) <= limits[len(list(layer.children())) > 1]
    config = settings("bf16")
    with training(copied(base, config, device), config) as state:
        used = fused_layers(state.components)
        images = [each for each in state.components.controlnet.parameters() if each.ndim == 4]
        in_layout = all(each.is_contiguous(memory_format=torch.channels_last) for each in images)
    figures = {f"off in {kind}": value for kind, value in off.items()}
    ok = len(used) == len(FUSED) and exact and close and in_layout
    return {**figures, "the same bits twice": exact, "used in training": used, "channels last": in_layout, "ok": ok}


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Let cuDNN compute in fp32, not in TF32, and take algorithms that give the same bits again."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        with tf32(allowed=False):
            yield
    finally:
        torch.backends.cudnn.deterministic = before


def compiled(base: Components, device: torch.device) -> Result:
    """Train with and without torch.compile: about the same gradients, two graphs, none in later updates."""
    import torch._dynamo.utils

    plain, fast = (gradients(base, "bf16", device, compile=on) for on in (False, True))
    config = settings("bf16", learning_rate=1e-4, compile=True)
    with training(copied(base, config, device), config) as state:
        do_steps(state, 0, 3, device)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = compared(plain, fast, 0.05)
    return {**found, "graphs": graphs, "ok": found["ok"] and graphs == 2}
