"""Checks of the step on a device, with a small base: they return figures, and whether these are as they should be."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from random_models import TextLengths
from reference import fake_row, save_state
from states import (
    TINY_RESOLUTION,
    copied,
    draws_of,
    random_batch,
    settings,
    training,
    with_controlnet,
)
from torch import Tensor
from torch.utils._pytree import tree_leaves

from raycontrolnet.config.output_settings import WEIGHTS_FILE
from raycontrolnet.model.batch import make_batch
from raycontrolnet.model.components import Components, load_controlnet
from raycontrolnet.model.step import StepMetrics, TrainState, controlnet_loss, train_step
from raycontrolnet.storage import checkpoint as checkpoints
from raycontrolnet.training.figures import OnItsWay, mean_over_workers
from raycontrolnet.training.host_copy import HostCopy
from raycontrolnet.training.state import state_parts, write_parts

CPU = torch.device("cpu")
SIZE = 2
BUSY_CYCLES = 2**28
"""Cycles of the device: about 0.15 s."""
NOTICES = [0.0, 1.0]
Result = dict[str, Any]
"""Figures, with `ok`."""


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


def update(state: TrainState, number: int, device: torch.device) -> OnItsWay:
    """Do an update as a worker does, from rows to the figures on their way; return what workers have seen."""
    first = SIZE * number
    tokenizers = tuple(TextLengths() for _ in state.components.text_encoders)
    rows = [fake_row(index, TINY_RESOLUTION) for index in range(first, first + SIZE)]
    batch = make_batch(rows, replace(state.components, tokenizers=tokenizers), device)
    draws = draws_of(state.components, first, SIZE, TINY_RESOLUTION, device)
    state.begin_update(1)
    metrics = train_step(state, batch, draws)
    _, notices = mean_over_workers([metrics.loss], 1.0, NOTICES, state.accelerator)
    return notices


def no_synchronisation(base: Components, device: torch.device) -> Result:
    """Let CUDA fail at whatever waits for the device in an update: its inputs, the step, and its figures."""
    said: dict[str, str | None] = {}
    for name, graphs in (("kernel by kernel", False), ("by a graph", True)):
        config = settings("bf16", cuda_graphs="on" if graphs else "off")
        with training(copied(base, config, device), config) as state:
            for number in range(2):
                update(state, number, device)
            torch.cuda.synchronize()
            try:
                torch.cuda.set_sync_debug_mode("error")
                notices = update(state, 2, device)
                torch.cuda.set_sync_debug_mode("default")
                said[name] = None if notices.read() == NOTICES else f"the notices are {notices.read()}"
            except RuntimeError as error:
                said[name] = str(error).splitlines()[0]
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return {**said, "ok": not any(said.values())}


def copied_checkpoint(base: Components, device: torch.device) -> Result:
    """Copy a state to pinned memory behind other work, train on, write the copy: the files of the state as it was."""
    config = settings("bf16", learning_rate=1e-4)
    with tempfile.TemporaryDirectory() as folder, training(copied(base, config, device), config) as state:
        host_copy = HostCopy()
        do_steps(state, 0, 1, device)
        host_copy.of(state_parts(state))  # pinning its memory would wait for the device
        do_steps(state, 1, 1, device)
        save_state(state, Path(folder) / "now")
        torch.cuda._sleep(BUSY_CYCLES)
        copied_parts = host_copy.of(state_parts(state))
        at_once = copy.deepcopy(copied_parts)  # before the device could be done, if nobody had waited for it
        do_steps(state, 2, 1, device)
        kept = all(map(_same, tree_leaves(at_once), tree_leaves(copied_parts)))
        write_parts(state.components.controlnet, at_once, Path(folder) / "copied")
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
    ok = kept and all(moments) and len(moments) > 100 and weights[0] == weights[1]
    return {"moments": len(moments), "copies stay": kept, "ok": ok}


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)
