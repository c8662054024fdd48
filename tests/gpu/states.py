"""Training states for the GPU kit: models of configurations with random weights, batches on the device."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from full_size import write_configurations
from random_models import built

from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.model.batch import Batch, Draws, draw, latent_shape
from raycontrolnet.model.components import Components
from raycontrolnet.model.families.registry import family_of
from raycontrolnet.model.files import local_files
from raycontrolnet.model.performance import fastest_convolutions, tf32, working_precision
from raycontrolnet.model.step import TrainState
from raycontrolnet.storage.checkpoint import Checkpoint
from raycontrolnet.training.schedule import Schedule
from raycontrolnet.training.state import accelerator_for, state_of

Base = Mapping[str, Mapping[str, Any]]

TINY_RESOLUTION = 128
ROWS = 100_000


def settings(precision: str = "no", **changes: Any) -> TrainConfig:
    return TrainConfig(
        pretrained_model_name_or_path="random weights", train_data_dir=".", seed=0, mixed_precision=precision, **changes
    )


def components_of(base: Base, config: TrainConfig, device: torch.device, *, cached: bool = True) -> Components:
    """Build the models on the device, frozen ones in the run's precision; the VAE waits on the CPU if it may.

    Weights are drawn on the device; the ControlNet's new ones are not zero, as after some training.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = local_files(write_configurations(base, Path(folder) / "base"))
        family = family_of(files.read_json("unet/config.json"))
        assert family
        torch.manual_seed(0)
        with torch.device(device):
            components = built(family, files, config, dtype=working_precision(config.mixed_precision))
    components.denoiser.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for weight in components.controlnet.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight, std=0.02)
    if cached:
        components.vae.to("cpu")
    return components


def copied(components: Components, config: TrainConfig, device: torch.device) -> Components:
    """Return a copy with the same weights, on another device or in another precision."""
    dtype, copies = working_precision(config.mixed_precision), copy.deepcopy(components)
    for module in copies.frozen():
        module.to(device=device, dtype=dtype)
    copies.controlnet.to(device)
    copies.family.move_tables(copies.noise_scheduler, device)
    return copies


@contextmanager
def training(
    components: Components, config: TrainConfig, *, checkpoint: Checkpoint | None = None
) -> Iterator[TrainState]:
    """Give the state of a run of one worker on the device of the ControlNet."""
    device = components.controlnet.device
    use_gpu = device.type == "cuda"
    with (
        accelerator_for(config, use_gpu=use_gpu) as accelerator,
        tf32(allowed=False),
        fastest_convolutions(device, working_precision(config.mixed_precision)),
    ):
        yield state_of(components, config, Schedule.of(config, ROWS, 1), accelerator, checkpoint)


def random_batch(components: Components, size: int, resolution: int, device: torch.device, *, cached: bool) -> Batch:
    """Return a batch of random images and captions, the same on every device."""
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 256, (2, size, resolution, resolution, 3), dtype=torch.uint8, generator=generator)
    shape = (size, 2, *latent_shape(components, resolution))
    posterior = torch.randn(shape, generator=generator).half() if cached else None
    tokens = tuple(
        torch.randint(0, encoder.config.vocab_size, (size, encoder.config.max_position_embeddings), generator=generator)
        for encoder in components.text_encoders
    )
    sizes = torch.full((size, 6), float(resolution)) if components.family.has_size_conditions else None
    batch = Batch(images[0] if not cached else None, images[1], tokens, sizes, posterior)
    moved: dict[str, Any] = {
        name: tuple(each.to(device) for each in value) if isinstance(value, tuple) else value.to(device)
        for name, value in batch._asdict().items()
        if value is not None
    }
    return batch._replace(**moved)


def draws_of(components: Components, first: int, size: int, resolution: int, device: torch.device) -> Draws:
    """Return the draws of samples `first` and after it."""
    shape = latent_shape(components, resolution)
    return draw(0, range(first, first + size), shape, components.draw_timestep, device)


def with_controlnet(components: Components, controlnet: Any) -> Components:
    return replace(components, controlnet=controlnet)


def with_torchs_layers(components: Components) -> None:
    """Give the models the layers of PyTorch and diffusers in place of the fused ones."""
    from raycontrolnet.model.fused.layers import FUSED

    originals = {fused: original for original, fused in FUSED.items()}
    for model in (components.denoiser, components.controlnet):
        for module in model.modules():
            if original := originals.get(type(module)):
                module.__class__ = original
