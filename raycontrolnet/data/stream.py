"""The stream of prepared batches: from sample indices, through Ray Data tasks, to the workers, in a fixed order.

One Ray Data row, and one block, holds one worker's batches for a few micro-steps (a bundle). Blocks are dealt to the
workers round robin, so that rank r of W at micro-step m gets samples [(m * W + r) * B, (m * W + r + 1) * B) after the
first. A lazy generator makes the blocks' indices as they are needed: start-up and memory do not grow with the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import pyarrow as pa

from raycontrolnet.cluster.blocks import WHOLE_BLOCKS, from_block, generate, to_block
from raycontrolnet.cluster.cpus import COUNT_CPUS, TASK_CPUS, let_training_go_first
from raycontrolnet.cluster.shared_files import SharedFiles
from raycontrolnet.data.order import Purpose, SampleOrder, keyed_rng
from raycontrolnet.data.records import DecodedRow, PreparedRow
from raycontrolnet.data.size_conditioning import SizeConditioning
from raycontrolnet.data.sources import Source
from raycontrolnet.data.transforms import choose_prompt, prepare_images
from raycontrolnet.errors import DataError, UserError

if TYPE_CHECKING:
    import ray

T = TypeVar("T")

BUNDLE_BYTES = 16 * 2**20
MOST_IN_BUNDLE = 8
"""Most batches that travel to a worker as one block."""
TICKET_BYTES = 256 * 1024
"""Ballast of a ticket. Ray Data holds a task back by the bytes of its waiting output, not by their number: without
ballast, the first task would run millions of tiny tickets ahead."""
REMOTE_READS = 16
"""Rows that one loading task reads at a time from an object store."""
ELASTIC_TASKS = 4
"""Loading tasks at a time that reserve no CPU."""
READ_AHEAD_BATCHES = 8
"""Batches per worker that may wait in Ray's object store."""
READ_AHEAD_BUNDLES = 3
"""The same in bundles, if that is more."""
MIN_READ_AHEAD_BYTES = 64 * 2**20
"""Ray Data shares its limit among its operators by rough estimates: a small limit would stop it."""


def batch_bytes(batch_size: int, resolution: int) -> int:
    """Return the size of a batch's images, two per sample."""
    return batch_size * 2 * 3 * resolution**2


@dataclass(frozen=True)
class StreamLayout:
    """The batches of a stream, and how they come to the workers."""

    first_sample: int
    micro_steps: int
    """Batches of every worker."""
    batch_size: int
    num_workers: int = 1
    """1 also if the number is not known: with a bundle of 1, batches are dealt one by one to any number of workers."""
    bundle: int = 1
    """Batches that travel together to a worker: Ray's work for each block costs tens of ms."""

    @staticmethod
    def bundle_for(batch_bytes: int) -> int:
        """Return how many batches make a block of some megabytes."""
        return min(MOST_IN_BUNDLE, max(1, BUNDLE_BYTES // batch_bytes))

    def bundles(self) -> Iterator[list[int]]:
        """Yield each bundle as the first samples of its batches; bundles are dealt to the workers round robin."""
        for start in range(0, self.micro_steps, self.bundle):
            micro_steps = range(start, min(start + self.bundle, self.micro_steps))
            for rank in range(self.num_workers):
                places = (micro_step * self.num_workers + rank for micro_step in micro_steps)
                yield [self.first_sample + place * self.batch_size for place in places]


class SampleRows(Protocol):
    """Rows that samples are made of: `PixelRows`, or a `LatentCache`."""

    @property
    def remote(self) -> bool:
        """True if rows are read over the network: slow one by one, so many at a time."""
        ...

    def decode(self, row: int) -> DecodedRow:
        """Return the source's row `row`.

        Raises:
            DataError: if it cannot be used; names it.
        """
        ...


@dataclass(frozen=True)
class PixelRows:
    """Rows whose images are decoded and transformed for every use."""

    source: Source
    resolution: int
    interpolation: str = "bilinear"

    @property
    def remote(self) -> bool:
        return self.source.remote

    def decode(self, row: int) -> DecodedRow:
        source_row = self.source.read(row)
        images = prepare_images(source_row, self.resolution, self.interpolation)
        return DecodedRow(
            source_row.captions, images.conditioning_image, images.image, original_size=images.original_size
        )


@dataclass(frozen=True)
class BatchLoader:
    """Maker of samples and batches by their index. Pickled to the loading tasks, so it holds no open files."""

    rows: SampleRows
    order: SampleOrder
    batch_size: int
    proportion_empty_prompts: float
    source: Source | None = None
    """Source of the rows, for messages."""
    files: SharedFiles | None = None
    """Files that a machine must see to make batches."""
    sizes: SizeConditioning | None = None
    """Rule for the samples' size conditions; None for none."""

    def place(self, sample_index: int) -> str:
        """Return where the row of the k-th sample stands, for messages."""
        row = self.order.row(sample_index)
        try:
            if self.source is not None:
                return self.source.read(row).place
        except DataError:  # of a cache whose data set is not on this machine
            pass
        return f"row {row + 1} of the data"

    def sample(self, sample_index: int) -> PreparedRow:
        """Return the k-th sample.

        Raises:
            DataError: if its row cannot be used; names it.
        """
        return self._prepare(
            self.order.row(sample_index), sample_index, Purpose.PROMPT, empty=self.proportion_empty_prompts
        )

    def held_out_sample(self, index: int) -> PreparedRow:
        """Return the held-out sample `index`, always with the same caption, never with the empty prompt.

        Raises:
            DataError: if its row cannot be used; names it.
        """
        return self._prepare(int(self.order.held_out[index]), index, Purpose.HELD_OUT_PROMPT, empty=0.0)

    def _prepare(self, row: int, index: int, purpose: Purpose, *, empty: float) -> PreparedRow:
        """Return a row with a prompt drawn for it; `empty` is the share of empty prompts."""
        decoded = self.rows.decode(row)
        return PreparedRow(
            sample_index=index,
            image=decoded.image,
            conditioning_image=decoded.conditioning_image,
            prompt=choose_prompt(decoded.captions, keyed_rng(self.order.seed, purpose, index), empty),
            posterior=decoded.posterior,
            size_conditions=self.sizes.conditions(decoded.original_size) if self.sizes else None,
        )

    def batch(self, first_sample: int) -> list[PreparedRow]:
        """Return samples [first_sample, first_sample + batch_size).

        Raises:
            UserError: if this machine does not see the data, or a row cannot be used.
        """
        if self.files:
            self.files.check_here()
        indices = range(first_sample, first_sample + self.batch_size)
        if self.rows.remote:
            with ThreadPoolExecutor(REMOTE_READS) as pool:
                return list(pool.map(self.sample, indices))
        return [self.sample(index) for index in indices]


def local_batches(loader: BatchLoader, first_sample: int, num_batches: int) -> Iterator[list[PreparedRow]]:
    """Yield the batches of a run without Ray, made in this process one by one."""
    for index in range(num_batches):
        yield loader.batch(first_sample + index * loader.batch_size)


def ray_dataset(
    loader_ref: ray.ObjectRef[BatchLoader], layout: StreamLayout, max_tasks: int | None, *, elastic: bool = False
) -> ray.data.Dataset:
    """Return the stream as a lazy Ray data set, a row for every bundle.

    Args:
        loader_ref: a `BatchLoader` in Ray's object store: rows of millions of paths travel once to each node.
        max_tasks: loading tasks at a time; None leaves it to Ray Data.
        elastic: whether Ray Train takes as many CPUs as there are. The tasks then reserve none: they would wait for
            ever. They have the lower priority.
    """
    num_cpus = 0 if elastic else TASK_CPUS
    return generate(_tickets, layout, num_cpus=0 if elastic else COUNT_CPUS).map_batches(
        _load,
        fn_kwargs={"loader_ref": loader_ref},
        num_cpus=num_cpus,
        concurrency=max_tasks or (ELASTIC_TASKS if elastic else None),
        **WHOLE_BLOCKS,
    )


def _tickets(layout: StreamLayout) -> Iterator[tuple[list[int], bytes]]:
    """Yield a ticket for every bundle: the first samples of its batches, and ballast."""
    ballast = bytes(TICKET_BYTES)
    return ((first_samples, ballast) for first_samples in layout.bundles())


def _load(ticket: pa.Table, loader_ref: ray.ObjectRef[BatchLoader]) -> pa.Table:
    """Return the bundle that a ticket asks for."""
    import ray

    let_training_go_first()
    loader, (first_samples, _) = ray.get(loader_ref), from_block(ticket)
    return to_block([_batch_or_error(loader, first_sample) for first_sample in first_samples])


def _batch_or_error(loader: BatchLoader, first_sample: int) -> list[PreparedRow] | UserError:
    """Return a batch, or why it cannot be made."""
    try:
        return loader.batch(first_sample)
    except UserError as error:
        # Raising it here would end the stream now, many batches before the workers come to this one.
        return error


def ray_batches(share: ray.data.DataIterator, prefetch_batches: int = 2) -> Iterator[list[PreparedRow]]:
    """Yield this worker's batches from its share (`ray.train.get_dataset_shard`) of `ray_dataset`.

    Raises:
        UserError: in the place of a batch that could not be made.
    """
    for table in share.iter_batches(prefetch_batches=prefetch_batches, **WHOLE_BLOCKS):
        for batch in from_block(table):
            if isinstance(batch, UserError):
                raise batch
            yield batch


def execution_options(batch_bytes: int, num_workers: int) -> ray.data.ExecutionOptions:
    """Return the options to run `ray_dataset` with: in order, and only a few batches ahead of the workers."""
    from ray.data import ExecutionOptions, ExecutionResources

    # Enough to hide the loading behind the step, and flat memory however slow the step is.
    batches = max(READ_AHEAD_BATCHES, READ_AHEAD_BUNDLES * StreamLayout.bundle_for(batch_bytes))
    ahead = max(MIN_READ_AHEAD_BYTES, batches * batch_bytes * num_workers)
    limits = ExecutionResources(object_store_memory=ahead)
    return ExecutionOptions(preserve_order=True, resource_limits=limits)


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield `items`, one ahead of the consumer, in a thread that starts at once."""
    end = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="read_ahead")
    pending = pool.submit(next, items, end)

    def consume() -> Iterator[T]:
        nonlocal pending
        try:
            while (item := pending.result()) is not end:
                pending = pool.submit(next, items, end)
                yield item  # type: ignore[misc]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return consume()
