"""The stream of prepared batches: from sample indices, through Ray Data tasks, to the workers, in a fixed order.

One Ray Data row, and one block, holds one worker's batches for a few micro-steps (a bundle). Blocks are dealt to the
workers round robin, so that rank r of W at micro-step m gets samples [(m * W + r) * B, (m * W + r + 1) * B) after the
first. A lazy generator makes the blocks' indices as they are needed: start-up and memory do not grow with the run.

Samples of the latent cache travel as they are stored, and are decoded in the worker's threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import pyarrow as pa

from raycontrolnet.cluster.blocks import WHOLE_BLOCKS, from_block, generate, to_block
from raycontrolnet.cluster.cpus import COUNT_CPUS, TASK_CPUS, let_training_go_first
from raycontrolnet.cluster.shared_files import SharedFiles
from raycontrolnet.data.augmentation import NONE, Augmentation, View
from raycontrolnet.data.buckets import Buckets
from raycontrolnet.data.decoding import prepared
from raycontrolnet.data.order import Purpose, SampleOrder, keyed_rng
from raycontrolnet.data.records import EncodedRow, PreparedRow, StoredRow
from raycontrolnet.data.sample_rows import SampleRows
from raycontrolnet.data.size_conditioning import SizeConditioning
from raycontrolnet.data.source import Source
from raycontrolnet.data.threads import in_threads
from raycontrolnet.data.transforms import choose_prompt
from raycontrolnet.errors import DataError, UserError

if TYPE_CHECKING:
    import ray

BUNDLE_BYTES = 16 * 2**20
MOST_IN_BUNDLE = 32
"""Most batches that travel to a worker as one block."""
TICKET_BYTES = 256 * 1024
"""Ballast of a ticket. Ray Data holds a task back by the bytes of its waiting output, not by their number: without
ballast, the first task would run millions of tiny tickets ahead."""
REMOTE_READS = 16
"""Rows that one loading task reads at a time from an object store."""
THREADS = 4
"""Threads in which a worker decodes samples, or a run without Ray loads them."""
ELASTIC_TASKS = 4
"""Loading tasks at a time that reserve no CPU."""
READ_AHEAD_BUNDLES = 8
"""Bundles per worker that may wait in Ray's object store. Ray Data leaves half of them to the loading tasks: one that
is in use, one that is fetched, one that is dealt, and one that waits for those of the other workers."""
MIN_READ_AHEAD_BYTES = 64 * 2**20
"""Ray Data shares its limit among its operators by rough estimates: a small limit would stop it."""


@dataclass(frozen=True)
class StreamLayout:
    """The batches of a stream, and how they come to the workers."""

    first_sample: int
    micro_steps: int
    """Batches of every worker."""
    batch_size: int
    num_workers: int = 1
    bundle: int = 1
    """Batches that travel together to a worker: Ray's work for each block costs tens of ms."""

    @staticmethod
    def bundle_for(batch_bytes: int) -> int:
        """Return how many batches make a block of some megabytes."""
        return min(MOST_IN_BUNDLE, max(1, BUNDLE_BYTES // batch_bytes))

    def bundles(self) -> Iterator[list[int]]:
        """Yield each bundle as the first samples of its batches; bundles are dealt to the workers round robin.

        The first bundles are of one batch, 2, 4 and so on: training need not wait for a whole one.
        """
        start, size = 0, 1
        while start < self.micro_steps:
            micro_steps = range(start, min(start + size, self.micro_steps))
            for rank in range(self.num_workers):
                places = (micro_step * self.num_workers + rank for micro_step in micro_steps)
                yield [self.first_sample + place * self.batch_size for place in places]
            start, size = micro_steps.stop, min(2 * size, self.bundle)


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
    buckets: Buckets | None = None
    """Size of each row, for batches of one size in `order`; None for the resolution squared."""
    augmentation: Augmentation = NONE

    @property
    def batch_bytes(self) -> int:
        """Bytes of a batch on its way to a worker, on average."""
        return max(1, self.batch_size * self.rows.row_bytes)

    def place(self, sample_index: int) -> str:
        """Return where the row of the k-th sample stands, for messages."""
        row = self.order.row(sample_index)
        with suppress(DataError):  # of a cache whose data set is not on this machine
            if self.source is not None:
                return self.source.read(row).place
        return f"row {row + 1} of the data"

    def sample(self, sample_index: int) -> PreparedRow:
        """Return the k-th sample.

        Raises:
            DataError: if its row cannot be used; names it.
        """
        return prepared(self._read(sample_index))

    def held_out_sample(self, index: int) -> PreparedRow:
        """Return the held-out sample `index`, always with the same caption, never with the empty prompt.

        Raises:
            DataError: if its row cannot be used; names it.
        """
        row = int(self.order.held_out[index])
        return prepared(self._with_prompt(row, index, Purpose.HELD_OUT_PROMPT, self.augmentation.plain, empty=0.0))

    def _read(self, sample_index: int) -> StoredRow | PreparedRow:
        """Return the k-th sample as it travels."""
        row, view = self.order.row(sample_index), self.augmentation.view(self.order.seed, sample_index)
        return self._with_prompt(row, sample_index, Purpose.PROMPT, view, empty=self.proportion_empty_prompts)

    def _with_prompt(
        self, row: int, index: int, purpose: Purpose, view: View, *, empty: float
    ) -> StoredRow | PreparedRow:
        """Return a row, seen by `view`, with a prompt drawn for it; `empty` is the share of empty prompts."""
        read, size = self.rows.read(row, view), self.buckets.size_of(row) if self.buckets else None
        prompt = choose_prompt(read.captions, keyed_rng(self.order.seed, purpose, index), empty)
        if isinstance(read, EncodedRow) and read.crop:
            view = View(*read.crop, view.flipped)
        sizes = self.sizes.conditions(read.original_size, view, size) if self.sizes else None
        if isinstance(read, EncodedRow):
            posterior = read.posterior_seen(flipped=view.flipped)
            return StoredRow(index, prompt, posterior, read.conditioning_png, sizes, read.place, view.flipped)
        return PreparedRow(index, read.image, read.conditioning_image, prompt, size_conditions=sizes)

    def batch(self, first_sample: int) -> list[StoredRow | PreparedRow]:
        """Return samples [first_sample, first_sample + batch_size) as they travel to a worker.

        Raises:
            UserError: if this machine does not see the data, or a row cannot be used.
        """
        if self.files:
            self.files.check_here()
        indices = range(first_sample, first_sample + self.batch_size)
        if self.rows.remote:
            with ThreadPoolExecutor(REMOTE_READS) as pool:
                return list(pool.map(self._read, indices))
        return [self._read(index) for index in indices]


def local_batches(loader: BatchLoader, first_sample: int, num_batches: int) -> Iterator[list[PreparedRow]]:
    """Yield the batches of a run without Ray, made in threads of this process, in order.

    Raises:
        UserError: in the place of a batch that cannot be made.
    """
    if loader.files:
        loader.files.check_here()
    indices = range(first_sample, first_sample + num_batches * loader.batch_size)
    threads = REMOTE_READS if loader.rows.remote else THREADS
    samples = in_threads(loader.sample, indices, threads, ahead=max(threads, loader.batch_size))
    while batch := list(islice(samples, loader.batch_size)):
        yield batch


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
    tickets = generate(_tickets, layout, num_cpus=0 if elastic else COUNT_CPUS)
    # The limit of `execution_options` is enough. This one holds tasks back by what the workers have fetched: with many
    # workers for ever, since each waits until there is a block for all.
    tickets.context.downstream_capacity_backpressure_ratio = None
    return tickets.map_batches(
        _load,
        fn_kwargs={"loader_ref": loader_ref},
        num_cpus=0 if elastic else TASK_CPUS,
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


def _batch_or_error(loader: BatchLoader, first_sample: int) -> list[StoredRow | PreparedRow] | UserError:
    """Return a batch, or why it cannot be made."""
    try:
        return loader.batch(first_sample)
    except UserError as error:
        # Raising it here would end the stream now, many batches before the workers come to this one.
        return error


def ray_batches(share: ray.data.DataIterator) -> Iterator[list[PreparedRow]]:
    """Yield this worker's batches from its share (`ray.train.get_dataset_shard`) of `ray_dataset`, decoded in threads.

    Raises:
        UserError: in the place of a batch that could not be made.
    """
    # A thread of Ray's fetches one block ahead all the same; with prefetching the first block came with the third.
    tables = iter(share.iter_batches(prefetch_batches=0, **WHOLE_BLOCKS))
    with ThreadPoolExecutor(THREADS, thread_name_prefix="decoding") as pool, closing(tables):
        for table in tables:
            for batch in from_block(table):
                if isinstance(batch, UserError):
                    raise batch
                yield list(pool.map(prepared, batch))


def execution_options(batch_bytes: int, num_workers: int) -> ray.data.ExecutionOptions:
    """Return the options to run `ray_dataset` with: in order, and only a few batches ahead of the workers."""
    from ray.data import ExecutionOptions, ExecutionResources

    # Enough to hide the loading behind the step, and flat memory however slow the step is.
    bundle_bytes = StreamLayout.bundle_for(batch_bytes) * batch_bytes
    ahead = max(MIN_READ_AHEAD_BYTES, READ_AHEAD_BUNDLES * bundle_bytes * num_workers)
    limits = ExecutionResources(object_store_memory=ahead)
    return ExecutionOptions(preserve_order=True, resource_limits=limits)
