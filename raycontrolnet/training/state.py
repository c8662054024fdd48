"""The training state: built, saved and loaded."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from safetensors.torch import save_file

from raycontrolnet.cluster.worker import gpu_share
from raycontrolnet.config.output_settings import WEIGHTS_FILE
from raycontrolnet.config.settings import StepConfig
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.order import Purpose, keyed_seed
from raycontrolnet.errors import UserError
from raycontrolnet.model.averages import with_averages
from raycontrolnet.model.components import Components, load_components
from raycontrolnet.model.gradients import GradientAverage
from raycontrolnet.model.graphs import GradientGraphs, no_graphs_because
from raycontrolnet.model.optim import build_lr_scheduler, build_optimizer
from raycontrolnet.model.optimizers import keeps_layouts
from raycontrolnet.model.performance import compile_models, enable_memory_savers, memory_share, working_precision
from raycontrolnet.model.step import TrainState
from raycontrolnet.storage.checkpoint import CONTROLNET_FOLDER, RAW_FOLDER, TRAINING_STATE_FILE, Checkpoint
from raycontrolnet.training.resumed_state import (
    build_averages,
    load_optimizer,
    package_of,
    read_rest,
    updates_in_schedule,
)
from raycontrolnet.training.schedule import Schedule

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import ModelMixin

logger = logging.getLogger(__name__)

FORMAT = {"format": "pt"}
"""Metadata without which the libraries do not read a file."""
PROCESS_GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def accelerator_for(step: StepConfig, *, use_gpu: bool, world_size: int = 1) -> Iterator[Accelerator]:
    """Give an `Accelerator` for mixed precision, accumulation and DDP, in a Ray Train worker or alone in a process.

    A process that shares a GPU, as a sweep's trial may, is kept to its share of the memory meanwhile.

    Accelerate's state is process-wide and keeps the first settings it saw: it is cleared for the next run.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    try:
        with _no_process_group() if world_size == 1 else nullcontext():
            accelerator = Accelerator(
                cpu=not use_gpu,
                mixed_precision=step.mixed_precision or "no",
                step_scheduler_with_optimizer=False,
                gradient_accumulation_plugin=GradientAccumulationPlugin(
                    num_steps=step.gradient_accumulation_steps, sync_with_dataloader=False
                ),
                # Without it, DDP holds every gradient twice.
                kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
            )
        with memory_share(accelerator.device, gpu_share()):
            yield accelerator
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


@contextmanager
def _no_process_group() -> Iterator[None]:
    """Hide the process group that Ray Train makes even for a single worker.

    Accelerate would wrap the model in DDP, which copies every gradient twice (a tenth of the step on a CPU).
    """
    hidden = {name: os.environ.pop(name) for name in PROCESS_GROUP_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def build_state(
    config: TrainConfig,
    schedule: Schedule,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None,
    token: str | None,
    *,
    encodes: bool = True,
    interpolation: str | None = None,
    models_read: Callable[[], None] = lambda: None,
) -> TrainState:
    """Return the state at the start of a run, or as `checkpoint` left it.

    Args:
        encodes: whether the step encodes images; without it the VAE waits on the CPU, for validation.
        interpolation: how images are resized; None if nobody says.
        models_read: called before the workers first wait for each other.

    Raises:
        UserError: if a model or the checkpoint does not fit the settings.
    """
    assert config.seed is not None  # the driver draws one
    components = load_components(
        config,
        device=accelerator.device,
        dtype=working_precision(config.mixed_precision),
        seed=keyed_seed(config.seed, Purpose.CONTROLNET, 0),
        token=token,
        controlnet_path=str(checkpoint.trained_folder) if checkpoint else None,
        vae_device=None if encodes else torch.device("cpu"),
        objective=config,
    )
    if config.image_interpolation_mode is None and interpolation not in (None, components.family.interpolation):
        raise UserError(
            f"--image_interpolation_mode: the driver does not see the base model, of which the default depends; give "
            f"{components.family.interpolation}, that of {components.family.title}"
        )
    models_read()
    return state_of(components, config, schedule, accelerator, checkpoint)


def state_of(
    components: Components,
    config: TrainConfig,
    schedule: Schedule,
    accelerator: Accelerator,
    checkpoint: Checkpoint | None = None,
) -> TrainState:
    """Return the state of models that are loaded, with the rest new, or as `checkpoint` left it.

    Raises:
        UserError: if the checkpoint does not fit the settings.
    """
    enable_memory_savers(
        components,
        gradient_checkpointing=config.gradient_checkpointing,
        xformers=config.enable_xformers_memory_efficient_attention,
    )
    if accelerator.device.type == "cuda" and keeps_layouts(config):
        # That of the activations: else every convolution would turn its weights first. Files have the other one.
        components.controlnet.to(memory_format=torch.channels_last)
    if accelerator.device.type == "cuda" and not config.compile:
        from raycontrolnet.model.fused.layers import fuse_layers  # imports diffusers

        fuse_layers(components)
    weights = list(components.controlnet.parameters())
    optimizer = build_optimizer(weights, config, schedule.learning_rate(config), fused=accelerator.scaler is None)
    saved = read_rest(checkpoint) if checkpoint else {}
    updates_done = updates_in_schedule(checkpoint, saved) if checkpoint else 0
    lr_scheduler = build_lr_scheduler(config, optimizer, schedule.total_updates, updates_done)
    if config.compile:
        compile_models(components)
    graphs = _graphs(weights, config, accelerator)
    is_alone = accelerator.num_processes == 1
    averages_itself = graphs is not None and not is_alone
    forward = components.controlnet.forward
    # For an evaluation: without DDP, which averages from Python.
    controlnet = accelerator.prepare_model(components.controlnet, evaluation_mode=averages_itself)
    if accelerator.native_amp:
        components.controlnet.forward = _in_half_precision(forward, accelerator)
    prepared_optimizer = accelerator.prepare_optimizer(optimizer)
    if checkpoint:  # after accelerate, which loads the optimizer's state once more, and not in its dtypes
        load_optimizer(optimizer, accelerator, checkpoint, saved)
    return TrainState(
        components=components,
        controlnet=controlnet,
        optimizer=prepared_optimizer,
        lr_scheduler=lr_scheduler,
        accelerator=accelerator,
        max_grad_norm=config.max_grad_norm,
        # On a CPU zeros cost a pass over memory, and adding to them another; DDP would hold gradients anyway.
        set_grads_to_none=config.set_grads_to_none or (accelerator.device.type == "cpu" and is_alone),
        samples_per_update=schedule.samples_per_update,
        objective=config,
        averages=build_averages(components.controlnet, config, checkpoint, saved),
        graphs=graphs,
        gradient_average=GradientAverage(weights) if averages_itself else None,
        step=checkpoint.step if checkpoint else 0,
        samples=checkpoint.samples if checkpoint else 0,
    )


def _in_half_precision(forward: Any, accelerator: Accelerator) -> Any:
    """Return a ControlNet's forward pass under autocast, in place of accelerate's wrapping.

    That makes outputs fp32, which the denoiser would cast back. The numbers are the same; each residual would be read
    and written twice more, and so would its gradient.

    Args:
        forward: the model's own, or compiled.
    """
    autocast = torch.autocast(accelerator.device.type, working_precision(accelerator.mixed_precision))
    if isinstance(forward, MethodType):  # of a copy of the model it is to be the copy's
        return MethodType(autocast(forward.__func__), forward.__self__)
    return autocast(forward)


def _graphs(
    weights: Sequence[torch.nn.Parameter], config: TrainConfig, accelerator: Accelerator
) -> GradientGraphs | None:
    """Return the place of a run's graphs; None if it has none."""
    on_gpu = accelerator.device.type == "cuda"
    problem = no_graphs_because(config, on_gpu=on_gpu, num_workers=accelerator.num_processes)
    if problem is None:
        return GradientGraphs(weights)
    if on_gpu:
        logger.info("no CUDA graphs: %s", problem)
    return None


class StateParts(NamedTuple):
    """Parts of a state that a checkpoint holds; the tensors are those that train."""

    weights: Mapping[str, torch.Tensor]
    """The ControlNet's, by name."""
    rest: Mapping[str, Any]
    """Optimizer, schedule, loss scaler, and number of updates in the averages."""
    averages: Mapping[str, torch.Tensor] = {}
    """The ControlNet's weights with averages in place of those that are trained; empty without averages."""


def state_parts(state: TrainState) -> StateParts:
    """Return what `build_state` needs to go on from `state`."""
    scaler: Any = state.accelerator.scaler
    rest = {
        "optimizer": state.optimizer.state_dict(),
        "optimizer_class": type(state.optimizer.optimizer).__name__,
        "optimizer_package": package_of(state.optimizer.optimizer),
        "lr_scheduler": state.lr_scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    controlnet = unwrap_controlnet(state)
    weights = controlnet.state_dict()
    if not state.averages:
        return StateParts(weights, rest)
    rest["averaged_updates"] = state.averages.optimization_step
    return StateParts(weights, rest, with_averages(weights, controlnet, state.averages))


def write_parts(controlnet: ModelMixin, parts: StateParts, folder: Path) -> None:
    """Write into a checkpoint's folder what `build_state` reads back.

    Args:
        controlnet: of which the configuration is written, not the weights.
        parts: of a state, or a copy of them.
        folder: empty.
    """
    folders = {CONTROLNET_FOLDER: parts.averages or parts.weights}
    if parts.averages:
        folders[RAW_FOLDER] = parts.weights
    for name, weights in folders.items():
        save_controlnet_config(controlnet, folder / name)
        saved = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        save_file(saved, folder / name / WEIGHTS_FILE, FORMAT)
    torch.save(dict(parts.rest), folder / TRAINING_STATE_FILE)


def save_controlnet_config(controlnet: ModelMixin, folder: Path) -> None:
    """Write the ControlNet's configuration, without the path that diffusers notes where it was read from."""
    controlnet.save_config(folder)
    _forget_origin(folder)


def _forget_origin(folder: Path) -> None:
    """Remove the path from a saved configuration that diffusers notes where the model was read from."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.pop("_name_or_path", None) is not None:
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def controlnet_bytes(state: TrainState) -> int:
    """Return the bytes of the ControlNet's weights."""
    return sum(value.numel() * value.element_size() for value in state.components.controlnet.parameters())


def unwrap_controlnet(state: TrainState) -> ModelMixin:
    """Return the ControlNet itself, without accelerate's wrapping."""
    return cast("ModelMixin", state.accelerator.unwrap_model(state.controlnet))
