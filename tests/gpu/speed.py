"""Memory and speed of the step on a GPU, beside the prediction and the loop of the common training script."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
from states import Base, components_of, draws_of, random_batch, settings, training, with_torchs_layers

from raycontrolnet.model.batch import Draws
from raycontrolnet.model.components import Components
from raycontrolnet.model.step import train_step
from raycontrolnet.predict.prediction import GIB
from raycontrolnet.training.host_copy import HostCopy
from raycontrolnet.training.state import state_parts

RESOLUTION = 512
WARM_UP, BLOCKS = 5, 3
CUDA = torch.device("cuda")
ATTENTION = ("flash", "fmha", "attention", "sdpa")
"""Parts of the names of kernels."""


@contextmanager
def free_memory() -> Iterator[None]:
    gc.collect()  # a trained model is a cycle, by accelerate
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        torch.cuda.empty_cache()


def draws_ahead(components: Components, size: int) -> Iterator[Draws]:
    """Yield the draws of update after update, one ahead, as a worker makes them."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(draws_of, components, 0, size, RESOLUTION, CUDA)
        for update in itertools.count(1):
            found, pending = pending.result(), pool.submit(draws_of, components, update * size, size, RESOLUTION, CUDA)
            yield found


class Peaks(NamedTuple):
    """The most memory of PyTorch, in GiB."""

    allocated: float
    """In the second update, which a graph captures, and the third, where what is in the graph's pool does not count."""
    first: float
    """In the first update, where cuDNN tries algorithms."""
    held: float
    """Taken from the device after the first update, with gaps and the graph's pool."""


def memory(base: Base, precision: str, size: int, *, cached: bool, **changes: Any) -> Peaks:
    """Measure the memory of three updates."""
    config = settings(precision, train_batch_size=size, **changes)
    peaks = []
    with free_memory(), training(components_of(base, config, CUDA, cached=cached), config) as state:
        batch = random_batch(state.components, size, RESOLUTION, CUDA, cached=cached)
        for _, draws in zip(range(3), draws_ahead(state.components, size), strict=False):
            torch.cuda.reset_peak_memory_stats()
            train_step(state, batch, draws)
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() / GIB)
            if len(peaks) == 1:
                torch.cuda.empty_cache()
        held = torch.cuda.max_memory_reserved() / GIB
    return Peaks(max(peaks[1:]), peaks[0], held)


def images_per_second(update: Callable[[], None], size: int, updates: int, until: float) -> list[float]:
    """Return the speed in each block of updates, fewer if the time (monotonic, seconds) is up."""
    for _ in range(WARM_UP):
        update()
    torch.cuda.synchronize()
    rates = []
    for _ in range(BLOCKS):
        started = time.perf_counter()
        for _ in range(updates):
            update()
        torch.cuda.synchronize()
        rates.append(size * updates / (time.perf_counter() - started))
        if time.monotonic() > until:
            break
    return rates


def ours(base: Base, size: int, updates: int, until: float, *, fused: bool = True, **changes: Any) -> dict[str, Any]:
    """Measure `train_step` in bf16 from cached latents, with its draws."""
    config = settings("bf16", train_batch_size=size, **changes)
    started = time.perf_counter()
    with free_memory(), training(components_of(base, config, CUDA), config) as state:
        if not fused:
            with_torchs_layers(state.components)
        batch = random_batch(state.components, size, RESOLUTION, CUDA, cached=True)
        draws = draws_ahead(state.components, size)
        train_step(state, batch, next(draws))
        torch.cuda.synchronize()
        found: dict[str, Any] = {"first update after s": time.perf_counter() - started}
        rates = images_per_second(lambda: _ignored(train_step(state, batch, next(draws))), size, updates, until)
        if state.graphs:
            found["no graphs"] = state.graphs.problem
        found |= {"images/s": median(rates), "blocks": rates, "GiB": torch.cuda.max_memory_allocated() / GIB}
        return found | {"GiB held": torch.cuda.max_memory_reserved() / GIB}


def checkpoint_copy(base: Base) -> dict[str, Any]:
    """Measure the copy of a state in host memory, for which training stops at a checkpoint."""
    config = settings("bf16", train_batch_size=1)
    with free_memory(), training(components_of(base, config, CUDA), config) as state:
        batch = random_batch(state.components, 1, RESOLUTION, CUDA, cached=True)
        train_step(state, batch, draws_of(state.components, 0, 1, RESOLUTION, CUDA))
        copy, seconds = HostCopy(), []
        size = copy.bytes_to_come(state_parts(state))
        for _ in range(4):
            torch.cuda.synchronize()
            started = time.perf_counter()
            copy.of(state_parts(state))
            seconds.append(time.perf_counter() - started)
    return {"GB": size / 1e9, "first s": seconds[0], "later s": median(seconds[1:])}


def reference(base: Base, size: int, updates: int, until: float) -> dict[str, Any]:
    """Measure the common script's loop in bf16: VAE and text encoder in every step, noise drawn on the device."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    config = settings("bf16", train_batch_size=size)
    with free_memory():
        accelerator = Accelerator(mixed_precision="bf16")
        components = components_of(base, config, CUDA, cached=False)
        components.denoiser.to(memory_format=torch.contiguous_format)
        (text_encoder,), vae, unet = components.text_encoders, components.vae, components.denoiser
        scheduler = components.noise_scheduler
        optimizer = torch.optim.AdamW(components.controlnet.parameters(), lr=1e-5)
        controlnet, optimizer = accelerator.prepare(components.controlnet, optimizer)
        batch = random_batch(components, size, RESOLUTION, CUDA, cached=False)
        assert batch.images is not None
        pixels = (batch.images.permute(0, 3, 1, 2).float() / 127.5 - 1).to(torch.bfloat16)
        control = (batch.conditioning_images.permute(0, 3, 1, 2).float() / 255).to(torch.bfloat16)
        number = scheduler.config["num_train_timesteps"]

        def update() -> None:
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, number, (size,), device=CUDA).long()
            noisy = scheduler.add_noise(latents.float(), noise.float(), timesteps).to(torch.bfloat16)
            hidden = text_encoder(batch.tokens[0], return_dict=False)[0]
            down, mid = controlnet(
                noisy, timesteps, encoder_hidden_states=hidden, controlnet_cond=control, return_dict=False
            )
            predicted = unet(
                noisy, timesteps, encoder_hidden_states=hidden, return_dict=False,
                down_block_additional_residuals=[each.to(torch.bfloat16) for each in down],
                mid_block_additional_residual=mid.to(torch.bfloat16),
            )[0]  # fmt: skip
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float(), reduction="mean")
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(controlnet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        try:
            rates = images_per_second(update, size, updates, until)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        return {"images/s": median(rates), "blocks": rates, "GiB": torch.cuda.max_memory_allocated() / GIB}


def profile(base: Base, size: int) -> dict[str, Any]:
    """Return the kernels that take most of three updates, the device's share of the time, and attention's kernels."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    config = settings("bf16", train_batch_size=size)
    with free_memory(), training(components_of(base, config, CUDA), config) as state:
        batch = random_batch(state.components, size, RESOLUTION, CUDA, cached=True)
        draws = draws_ahead(state.components, size)
        for _ in range(WARM_UP):
            train_step(state, batch, next(draws))
        torch.cuda.synchronize()
        started = time.perf_counter()
        with profiled(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            for _ in range(3):
                train_step(state, batch, next(draws))
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    kernels: dict[str, list[float]] = {}
    for event in found.events():
        if event.device_type.name == "CUDA":
            kernels.setdefault(event.name, []).append(event.device_time_total / 1e6)
    ranked = sorted(kernels.items(), key=lambda item: -sum(item[1]))
    attention = [name for name in kernels if any(word in name.lower() for word in ATTENTION)]
    return {
        "seconds": seconds,
        "share of the time with a kernel": sum(sum(times) for times in kernels.values()) / seconds,
        "kernels": [{"name": name[:120], "calls": len(times), "seconds": sum(times)} for name, times in ranked[:30]],
        "attention": [name[:120] for name in attention],
    }


def _ignored(_: object) -> None:
    return None
