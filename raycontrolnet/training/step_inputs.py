"""The inputs of a worker's steps: prepared rows made into batches and draws on the device, ahead of the step."""

from __future__ import annotations

from collections.abc import Iterator

from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.data.records import PreparedRow
from raycontrolnet.errors import RunError
from raycontrolnet.model.batch import Batch, Draws, draw, latent_shape, make_batch
from raycontrolnet.model.prompts import warn_if_cut
from raycontrolnet.model.step import TrainState
from raycontrolnet.training.schedule import Share


def step_inputs(
    batches: Iterator[list[PreparedRow]],
    state: TrainState,
    share: Share,
    config: TrainConfig,
    first_sample: int,
) -> Iterator[tuple[Batch, Draws]]:
    """Yield each micro-step's batch and draws on the device; runs in a thread, one ahead of the step.

    Args:
        batches: rows of this worker's micro-batches, in order.
        state: has the models and the device; it goes on training meanwhile.
        first_sample: number of the stream's first sample.

    Raises:
        RunError: if a batch is not the one that comes next.
    """
    device, seed = state.accelerator.device, config.seed
    assert seed is not None
    own = state.components.with_own_tokenizers()  # validation uses the others in another thread
    for micro_step, rows in enumerate(batches):
        expected = first_sample + share.place(micro_step) * config.train_batch_size
        if (found := rows[0].sample_index) != expected:
            raise RunError(
                f"Worker {share.rank} got sample {found} instead of {expected}: the data stream is out of order. "
                "Please report this with the output folder's run.log"
            )
        for row in rows:
            warn_if_cut(own.tokenizers, row.prompt)
        indices, shape = [row.sample_index for row in rows], latent_shape(own, rows[0].size)
        yield make_batch(rows, own, device), draw(seed, indices, shape, own.draw_timestep, device, objective=config)
