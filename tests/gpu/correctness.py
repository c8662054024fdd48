"""Checks of the step on a device, with a small base: they return figures, and whether these are as they should be."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from full_size import TINY
from states import (
    TINY_RESOLUTION,
    components_of,
    copied,
    draws_of,
    random_batch,
    settings,
    training,
    with_controlnet,
)
from torch import Tensor

from raycontrolnet.config.output_settings import WEIGHTS_FILE
from raycontrolnet.model.components import Components, load_controlnet
from raycontrolnet.model.performance import fused_layers, tf32
from raycontrolnet.model.step import StepMetrics, TrainState, controlnet_loss, train_step
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.training.saver import HostCopy
from raycontrolnet.training.state import save_state, state_parts, write_parts

CPU = torch.device("cpu")
SIZE = 2
Result = dict[str, Any]
"""Figures, with `ok`."""


NAMES = (
    "fp32 is the CPU's", "bf16 gradients", "gradient checkpointing", "exact resume", "fp16 gradients",
    "exact resume in fp16", "the loss scaler skips", "no synchronisation", "CUDA graphs", "fused layers", "compiled",
    "copied checkpoint", "exact resume of 8-bit Adam",
)  # fmt: skip
"""All checks; the last nine need a GPU, and the very last bitsandbytes."""
NORMS = ((4, 320, 64, 64), (2, 960, 24, 40), (3, 1280, 8, 8), (1, 80, 33, 31))
"""Shapes of images, [B, C, H, W]; with 16 groups."""
KINDS = {
    "fp32": (torch.float32, torch.float32, 1e-5, 1e-4),
    "bf16": (torch.bfloat16, torch.bfloat16, 1e-2, 2e-2),
    "autocast": (torch.bfloat16, torch.float32, 1e-2, 2e-2),
}
"""Kind of a comparison -> dtype of the layers' inputs and of their weights; largest difference by the norm of a layer,
and of a block of several."""


def checks(device: torch.device) -> dict[str, Callable[[], Result]]:
    """Return name -> check, for those that this kind of device has."""
    base = components_of(TINY, settings(), CPU, cached=False)
    found: dict[str, Callable[[], Result]] = {
        "fp32 is the CPU's": lambda: fp32_is_the_cpus(base, device),
        "bf16 gradients": lambda: half_precision(base, device, "bf16"),
        "gradient checkpointing": lambda: gradient_checkpointing(base, device),
        "exact resume": lambda: exact_resume(base, device, "bf16"),
    }
    if device.type == "cuda":
        found |= {
            "fp16 gradients": lambda: half_precision(base, device, "fp16"),
            "exact resume in fp16": lambda: exact_resume(base, device, "fp16"),
            "the loss scaler skips": lambda: loss_scaler_skips(base, device),
            "no synchronisation": lambda: no_synchronisation(base, device),
            "CUDA graphs": lambda: cuda_graphs(base, device),
            "fused layers": lambda: fused(base, device),
            "compiled": lambda: compiled(base, device),
            "copied checkpoint": lambda: copied_checkpoint(base, device),
        }
        if find_spec("bitsandbytes"):
            found[NAMES[-1]] = lambda: exact_resume(base, device, "bf16", use_8bit_adam=True)
    return found


def gradients(components: Components, precision: str, device: torch.device, **changes: Any) -> tuple[float, Tensor]:
    """Return the loss of a batch from pixels, and the gradients as one vector, fp32 on the CPU."""
    config = settings(precision, **changes)
    with training(copied(components, config, device), config) as state:
        batch = random_batch(state.components, SIZE, TINY_RESOLUTION, device, cached=False)
        draws = draws_of(state.components, 0, SIZE, TINY_RESOLUTION, device)
        loss = controlnet_loss(state.components, state.controlnet, batch, draws).mean()
        loss.backward()
        found = [weight.grad for weight in state.components.controlnet.parameters()]
        return float(loss.detach()), torch.cat([each.float().flatten() for each in found if each is not None]).cpu()


def compared(one: tuple[float, Tensor], other: tuple[float, Tensor], tolerance: float) -> Result:
    (loss, gradient), (other_loss, other_gradient) = one, other
    off = float((gradient - other_gradient).norm() / gradient.norm())
    losses = abs(loss - other_loss) / abs(loss)
    return {"loss off by": losses, "gradients off by": off, "tolerance": tolerance, "ok": max(losses, off) <= tolerance}


def fp32_is_the_cpus(base: Components, device: torch.device) -> Result:
    return compared(gradients(base, "no", CPU), gradients(base, "no", device), 1e-4)


def half_precision(base: Components, device: torch.device, precision: str) -> Result:
    tolerance = {"bf16": 0.1, "fp16": 0.02}[precision]
    return compared(gradients(base, "no", device), gradients(base, precision, device), tolerance)


def gradient_checkpointing(base: Components, device: torch.device) -> Result:
    plain, less = (gradients(base, "bf16", device, gradient_checkpointing=on) for on in (False, True))
    return compared(plain, less, 1e-3)


def do_steps(state: TrainState, first: int, number: int, device: torch.device) -> list[StepMetrics]:
    batch = random_batch(state.components, SIZE, TINY_RESOLUTION, device, cached=False)
    return [
        train_step(state, batch, draws_of(state.components, SIZE * step, SIZE, TINY_RESOLUTION, device))
        for step in range(first, first + number)
    ]


def exact_resume(base: Components, device: torch.device, precision: str, **changes: Any) -> Result:
    """Do 4 updates at once, and 2 and 2 with a checkpoint between them: the same losses, bit for bit."""
    config = settings(precision, learning_rate=1e-4, max_train_steps=4, **changes)
    with tempfile.TemporaryDirectory() as folder:
        with training(copied(base, config, device), config) as state:
            do_steps(state, 0, 2, device)
            how: dict[str, Any] = {"step": 2, "samples": 2 * SIZE, "seed": 0, "run_id": "kit", "facts": {}}
            checkpoint = checkpoints.write(Path(folder), save=lambda into: save_state(state, into), **how)
            straight = [float(each.loss) for each in do_steps(state, 2, 2, device)]
        path = str(checkpoint.path / checkpoints.CONTROLNET_FOLDER)
        controlnet = load_controlnet(path, base.family).to(device).train()
        resumed = with_controlnet(copied(base, config, device), controlnet)
        with training(resumed, config, checkpoint=checkpoint) as state:
            again = [float(each.loss) for each in do_steps(state, 2, 2, device)]
    return {"straight": straight, "resumed": again, "ok": straight == again}


def loss_scaler_skips(base: Components, device: torch.device) -> Result:
    """Plant an infinity in an update: weights stay, the scale is halved, the next update is taken."""
    config = settings("fp16", learning_rate=1e-4)
    with training(copied(base, config, device), config) as state:
        scaler: Any = state.accelerator.scaler
        do_steps(state, 0, 8, device)  # the scale comes down from 65,536 to what these gradients bear
        before, scale = copy.deepcopy(state.components.controlnet.state_dict()), scaler.get_scale()
        batch = random_batch(state.components, SIZE, TINY_RESOLUTION, device, cached=False)
        draws = draws_of(state.components, 8 * SIZE, SIZE, TINY_RESOLUTION, device)
        train_step(state, batch, draws._replace(noise=draws.noise * torch.inf))
        after = state.components.controlnet.state_dict()
        kept = all(torch.equal(value, after[name]) for name, value in before.items())
        halved = scaler.get_scale() == scale / 2
        do_steps(state, 9, 1, device)
        taken = not all(torch.equal(value, after[name]) for name, value in before.items())
    return {"weights kept": kept, "scale halved": halved, "next taken": taken, "ok": kept and halved and taken}


def no_synchronisation(base: Components, device: torch.device) -> Result:
    """Let CUDA fail at whatever waits for the device in a step whose batch and draws are there."""
    said: dict[str, str | None] = {}
    for name, without in (("kernel by kernel", True), ("by a graph", False)):
        config = settings("bf16", no_cuda_graphs=without)
        with training(copied(base, config, device), config) as state:
            do_steps(state, 0, 2, device)
            batch = random_batch(state.components, SIZE, TINY_RESOLUTION, device, cached=False)
            draws = draws_of(state.components, 2 * SIZE, SIZE, TINY_RESOLUTION, device)
            torch.cuda.synchronize()
            try:
                torch.cuda.set_sync_debug_mode("error")
                train_step(state, batch, draws)
                said[name] = None
            except RuntimeError as error:
                said[name] = str(error).splitlines()[0]
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return {**said, "ok": not any(said.values())}


GRAPHED: dict[str, dict[str, Any]] = {
    "bf16": {"gradient_checkpointing": True},
    "fp16": {"gradient_accumulation_steps": 2, "set_grads_to_none": True},
    "no": {"optimizer": "torch.optim.RAdam"},
}
"""Precision -> other settings."""


def cuda_graphs(base: Components, device: torch.device) -> Result:
    """Train with and without graphs, in two sizes by turns, with a rest between: the same losses and weights, by bits.

    cuDNN takes its algorithms without a trial, of which the outcome could differ.
    """
    different, problems = [], []
    for precision, changes in GRAPHED.items():
        found = []
        for without in (True, False):
            config = settings(precision, learning_rate=1e-4, no_cuda_graphs=without, **changes)
            with training(copied(base, config, device), config) as state:
                torch.backends.cudnn.benchmark = False
                losses = [each.loss for first in (0, 4) for each in _by_turns(state, first, device)]
                found.append([*losses, *(weight.detach() for weight in state.components.controlnet.parameters())])
                if state.graphs and state.graphs.problem:
                    problems.append(f"{precision}: {state.graphs.problem}")
        if not all(map(torch.equal, *found)):
            different.append(precision)
    return {"differ": different, "problems": problems, "ok": not different and not problems}


def _by_turns(state: TrainState, first: int, device: torch.device) -> Iterator[StepMetrics]:
    """Do four steps with batches of two sizes by turns, and rest."""
    for index in range(first, first + 4):
        size = SIZE + index % 2
        batch = random_batch(state.components, size, TINY_RESOLUTION, device, cached=False)
        yield train_step(state, batch, draws_of(state.components, 8 * index, size, TINY_RESOLUTION, device))
    with state.at_rest():
        pass


def fused(base: Components, device: torch.device) -> Result:
    """Compare the fused layers' outputs and gradients with fp64's on the CPU, and with their own, bit for bit."""
    from raycontrolnet.model.fused.layers import FUSED, fused_class
    from raycontrolnet.model.fused.trials import trials, with_gradients

    off: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    exact = close = True
    for shape, (kind, (values, weights, *limits)) in itertools.product(NORMS, KINDS.items()):
        for trial in trials(shape):
            if trial.under_autocast and kind != "autocast":
                continue
            given = trial.to(CPU, torch.bfloat16, values)  # weights that bf16 has too
            layer, inputs, _ = copy.deepcopy(given).to(CPU, torch.float64, torch.float64)
            expected = with_gradients(layer, *inputs)
            layer, inputs, _ = given.to(device, weights, values)
            cls = fused_class(layer)
            assert cls
            layer.__class__ = cls
            with exact_convolutions(), torch.autocast(device.type, torch.bfloat16, enabled=kind == "autocast"):
                found, again = (with_gradients(layer, *inputs) for _ in range(2))
            exact &= all(map(torch.equal, found, again))
            pairs = zip(found, expected, strict=True)
            differences = [float((one.cpu().double() - other).norm() / other.norm()) for one, other in pairs]
            off[kind][cls.__name__] = max(off[kind].get(cls.__name__, 0.0), *differences)
            close &= max(differences) <= limits[len(list(layer.children())) > 1]
    config = settings("bf16")
    with training(copied(base, config, device), config) as state:
        used = fused_layers(state.components)
    figures = {f"off in {kind}": value for kind, value in off.items()}
    ok = len(used) == len(FUSED) and exact and close
    return {**figures, "the same bits twice": exact, "used in training": used, "ok": ok}


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


def copied_checkpoint(base: Components, device: torch.device) -> Result:
    """Copy a state to pinned memory, train on, write the copy: the files of the state as it was."""
    config = settings("bf16", learning_rate=1e-4)
    with tempfile.TemporaryDirectory() as folder, training(copied(base, config, device), config) as state:
        do_steps(state, 0, 2, device)
        save_state(state, Path(folder) / "now")
        copy = HostCopy().of(state_parts(state))
        do_steps(state, 2, 1, device)
        write_parts(state.components.controlnet, copy, Path(folder) / "copied")
        now, then = (
            torch.load(Path(folder) / name / checkpoints.TRAINING_STATE_FILE, map_location="cpu", weights_only=True)
            for name in ("now", "copied")
        )
        moments = [
            torch.equal(value, then["optimizer"]["state"][number][name])
            for number, of in now["optimizer"]["state"].items()
            for name, value in of.items()
        ]
        weights = [
            (Path(folder) / name / checkpoints.CONTROLNET_FOLDER / WEIGHTS_FILE).read_bytes()
            for name in ("now", "copied")
        ]
    return {"moments": len(moments), "ok": all(moments) and len(moments) > 100 and weights[0] == weights[1]}
