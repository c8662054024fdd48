"""The held-out measure: the learning of a model, and its obedience to control images, on rows that are held out.

The training loss shows neither: it depends mostly on the timesteps drawn, and stays flat when control appears suddenly
(Zhang et al. 2023, arXiv:2302.05543, section 4). Here rows that are never trained on are measured with fixed noise and
timesteps spread evenly, once with their own control images and once with those of others:

    val_loss                          how well noise is removed from held-out images
    control_gap = shuffled - val_loss how much the right control image helps: zero until control appears

The rows are read, decoded and encoded once and then kept in memory, as far as they fit: `KeptSamples`.

Nothing here touches the training's randomness. The figures depend on (config, data, seed, weights), not on the number
of workers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby, islice, pairwise, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from raycontrolnet.data.order import Purpose
from raycontrolnet.data.records import PreparedRow, UInt8Image
from raycontrolnet.data.stream import BatchLoader
from raycontrolnet.data.transforms import resize_and_crop
from raycontrolnet.errors import DataError
from raycontrolnet.model.batch import Batch, Draws, draw, latent_shape, make_batch
from raycontrolnet.model.components import Components
from raycontrolnet.model.step import TrainState, controlnet_loss, with_posterior
from raycontrolnet.sampling.pipeline import evaluating
from raycontrolnet.text import above, decimals, plus_minus
from raycontrolnet.training import metrics
from raycontrolnet.training.state import unwrap_controlnet

logger = logging.getLogger(__name__)

HELD_OUT_FILE = "validation.jsonl"
MIN_GAP_ERRORS = 2.0
MIN_GAP_SHARE = 0.01
"""Control has appeared when the gap exceeds this many of its standard errors, and this share of the held-out loss."""
AVERAGES = "averages"
"""Entry `weights` of a line of validation.jsonl that is of averages of the weights (--use_ema)."""
PRECISION = 1e-6
"""Share of the loss below which a difference is noise of 32-bit numbers."""
MOST_KEPT_BYTES = 2 * 2**30
"""Memory of a worker for held-out samples. One of 512 pixels takes 0.9 MB: control image, and latents in fp32."""

Sample = tuple[PreparedRow, UInt8Image]
"""A held-out sample, and the conditioning image of another."""


class HeldOutMetrics(NamedTuple):
    """One line of validation.jsonl."""

    step: int
    val_loss: float
    """Mean over the held-out samples."""
    val_loss_shuffled: float
    """The same with every sample's control image replaced by another's."""
    control_gap: float
    """val_loss_shuffled - val_loss."""
    control_gap_error: float
    """Standard error of control_gap, from its spread over the samples."""
    seconds: float
    """Duration of the measurement."""
    time: float
    """Unix seconds."""


class MeasureStopped(Exception):
    """The measurement was ended before its last batch, on all workers."""


class KeptSamples:
    """The first batches of a worker's held-out samples, as an earlier measurement read and encoded them.

    A row that cannot be read ends them: it may be read the next time.

    Args:
        most_bytes: memory for them; the rest is read and encoded at every measurement.
    """

    def __init__(self, most_bytes: int = MOST_KEPT_BYTES):
        self.batches: list[list[Sample]] = []
        self.num_samples = 0
        self.room = most_bytes

    def add(self, samples: Sequence[Sample], posterior: torch.Tensor, expected: Sequence[int]) -> None:
        """Keep the batch after those that are kept, if there is room and it has the `expected` sample indices.

        Args:
            posterior: [B, 2, C, h, w]: mean and log-variance of the samples' latents.
        """
        exact = posterior.float() if posterior.dtype == torch.bfloat16 else posterior  # NumPy has no bfloat16
        latents = exact.cpu().numpy()
        num_bytes = latents.nbytes + sum(row.conditioning_image.nbytes for row, _ in samples) + samples[-1][1].nbytes
        if num_bytes > self.room or [row.sample_index for row, _ in samples] != list(expected):
            self.room = 0
            return
        pairs = zip(samples, latents, strict=True)
        self.batches.append([(replace(row, image=None, posterior=own), other) for (row, other), own in pairs])
        self.num_samples += len(samples)
        self.room -= num_bytes


def measure(
    state: TrainState,
    loader: BatchLoader,
    *,
    rank: int = 0,
    world_size: int = 1,
    ends_early: Callable[[], bool] = lambda: False,
    kept: KeptSamples | None = None,
) -> HeldOutMetrics | None:
    """Measure the held-out rows of `loader`, every worker its share; all workers must call it together.

    A row that cannot be read is left out, and logged.

    Args:
        ends_early: asked before every batch; leaves out the rest.
        kept: of earlier measurements of this share, to use and to add to.

    Returns:
        The same on every worker; None if there is nothing to measure.

    Raises:
        MeasureStopped: if `ends_early` has answered True on a worker.
    """
    started = time.perf_counter()
    accelerator, components = state.accelerator, state.components
    controlnet = unwrap_controlnet(state)
    ordered = _ordered(loader)
    share = np.array_split(ordered, world_size)[rank].tolist()
    sums, kept = torch.zeros(5, dtype=torch.float64), kept or KeptSamples(most_bytes=0)
    num_kept = len(kept.batches)
    to_read = _batches(_with_others(loader, share[kept.num_samples :], ordered), loader.batch_size)
    with evaluating((controlnet, *components.frozen())), torch.no_grad():
        models = replace(components, controlnet=controlnet)
        for number, samples in enumerate(chain(list(kept.batches), to_read)):
            if ends_early():
                sums[-1] = 1.0
                break
            rows, others = [row for row, _ in samples], [other for _, other in samples]
            indices = [row.sample_index for row in rows]
            batch = with_posterior(models, make_batch(rows, components, accelerator.device))
            if number >= num_kept and kept.room:
                assert batch.posterior is not None
                kept.add(samples, batch.posterior, share[kept.num_samples :][: len(samples)])
            draws = draw(
                loader.order.seed,
                indices,
                latent_shape(components, rows[0].size),
                components.draw_timestep,
                accelerator.device,
                Purpose.HELD_OUT,
            )._replace(timesteps=_timesteps(state, loader, indices))
            sums[:-1] += _sums(models, batch, np.stack(others), draws)
    if world_size > 1:
        sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
    *figures, stopped = sums.tolist()
    if stopped:
        raise MeasureStopped
    return _metrics(state.step, figures, time.perf_counter() - started)


def _sums(models: Components, batch: Batch, others: UInt8Image, draws: Draws) -> torch.Tensor:
    """Return the number of samples of a batch, and the sums of their losses, gaps and squared gaps.

    Args:
        others: the other rows' conditioning images, for the gaps.
    """
    right = controlnet_loss(models, models.controlnet, batch, draws)
    conditioning_images = torch.from_numpy(others).to(right.device)
    shuffled = controlnet_loss(
        models, models.controlnet, batch._replace(conditioning_images=conditioning_images), draws
    )
    gaps = (shuffled - right).double().cpu()
    totals = [float(len(right)), float(right.double().sum()), float(gaps.sum()), float(gaps.pow(2).sum())]
    return torch.tensor(totals, dtype=torch.float64)


def _metrics(step: int, sums: Sequence[float], seconds: float) -> HeldOutMetrics | None:
    """Return the figures, from the number of samples and the sums of their losses, gaps and squared gaps."""
    count, right, gap, squares = sums
    if count < 2:
        return None
    mean = gap / count
    error = math.sqrt(max(0.0, squares / count - mean**2) / (count - 1))
    return HeldOutMetrics(step, right / count, right / count + mean, mean, error, round(seconds, 3), time.time())


def _timesteps(state: TrainState, loader: BatchLoader, indices: Sequence[int]) -> torch.Tensor:
    """Return the timesteps [B]; those of all held-out samples are spread evenly over the training timesteps."""
    family, noise_scheduler = state.components.family, state.components.noise_scheduler
    fractions = [(index + 0.5) / len(loader.order.held_out) for index in indices]
    spread = [family.spread_timestep(fraction, noise_scheduler) for fraction in fractions]
    return torch.tensor(spread, device=state.accelerator.device)


def _ordered(loader: BatchLoader) -> NDArray[np.int64]:
    """Return the indices of all held-out samples; those of one bucket follow each other."""
    rows = loader.order.held_out
    return np.arange(len(rows)) if loader.buckets is None else np.argsort(loader.buckets.of_row[rows], kind="stable")


def _with_others(loader: BatchLoader, share: Sequence[int], ordered: NDArray[np.int64]) -> Iterator[Sample]:
    """Yield the samples of a share, each with the conditioning image of the next of all; the first follows the last.

    The image of one in another bucket is resized and cropped to the sample's size.
    """
    next_of_last = np.roll(ordered, -1)[ordered == share[-1]].tolist() if share else []
    rows = (_read(loader, index) for index in [*share, *next_of_last])
    for row, other in pairwise(rows):
        if row is not None and other is not None:
            image = other.conditioning_image
            yield row, image if other.size == row.size else resize_and_crop(Image.fromarray(image), row.size)


def _read(loader: BatchLoader, index: int) -> PreparedRow | None:
    try:
        return loader.held_out_sample(index)
    except DataError as error:
        logger.warning("a held-out sample is left out: %s", error)
        return None


def _batches(samples: Iterator[Sample], batch_size: int) -> Iterator[list[Sample]]:
    """Yield batches of samples of one size."""
    for _, of_one_size in groupby(samples, key=lambda sample: sample[0].size):
        while batch := list(islice(of_one_size, batch_size)):
            yield batch


def read(output_dir: Path) -> list[dict[str, Any]]:
    """Return the measurements of a run so far, oldest first."""
    return metrics.read(output_dir / HELD_OUT_FILE)


def control_appeared(records: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the step since which every measurement shows control; None if the last one does not.

    Args:
        records: lines of validation.jsonl, oldest first.
    """
    showing = list(takewhile(_shows_control, reversed(records)))
    return int(showing[-1]["step"]) if showing else None


def _shows_control(record: Mapping[str, Any]) -> bool:
    gap = record["control_gap"]
    return bool(gap > MIN_GAP_ERRORS * record["control_gap_error"] and gap > MIN_GAP_SHARE * record["val_loss"])


def summary(output_dir: Path) -> dict[str, Any]:
    """Return val_loss, control_gap and control_appeared_at_step for run.json and the model card; empty without any."""
    records = read(output_dir)
    if not records:
        return {}
    last = {name: records[-1][name] for name in ("val_loss", "control_gap")}
    return last | {"control_appeared_at_step": control_appeared(records)}


def noise_of(loss: float) -> float:
    """Return the size up to which differences of such losses may be the rounding of their 32 bits."""
    return PRECISION * abs(loss)


def gap_and_error(record: Mapping[str, Any]) -> tuple[str, str]:
    """Return the control gap and its error in words; of what may be rounding, the most that it may be."""
    noise = noise_of(record["val_loss"])
    return above(record["control_gap"], noise, 2), plus_minus(record["control_gap_error"], noise)


def in_words(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the last measurement in words, for a log."""
    last = records[-1]
    gap = f"control gap {''.join(gap_and_error(last))}"
    step = control_appeared(records)
    shown = "no control yet" if step is None else f"control has appeared at step {step}"
    of = " of the averages" if last.get("weights") == AVERAGES else ""
    return f"held-out loss{of} {decimals(last['val_loss'])}, {gap}: {shown}"
