"""The encoding pass: shards in, files of the latent cache out; by Ray Data, or in this process.

load (tasks on CPUs)  ->  encode (a pool of actors, on GPUs or CPUs)  ->  store (tasks)
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raycontrolnet.data.cache_folder import CacheFolder
from raycontrolnet.data.encoding import EncodedShard, LoadedShard, ShardResult, load_shard, store_shard, with_posteriors
from raycontrolnet.data.manifest import SHARD_ROWS, Encoding, Shard
from raycontrolnet.data.sources import Source
from raycontrolnet.data.stream import COUNT_CPUS, LOADING_NICENESS, TASK_CPUS
from raycontrolnet.errors import RunError, UserError
from raycontrolnet.settings import ModelConfig

if TYPE_CHECKING:
    from raycontrolnet.cluster import WorkerResources
    from raycontrolnet.model.latent_encoder import LatentEncoder

SHARDS_AHEAD = 3
"""Loaded shards per actor that may wait in Ray's object store: one in work, one next, one being made."""
MIN_STORE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class EncodeJob:
    """What is to be encoded, and how. Plain data for tasks and actors."""

    source: Source
    folder: CacheFolder
    encoding: Encoding
    shards: tuple[Shard, ...]
    """Those that are missing."""
    model: ModelConfig
    batch_size: int
    token: str | None = field(default=None, repr=False)

    def encoder(self, *, use_gpu: bool) -> LatentEncoder:
        import torch

        from raycontrolnet.model.latent_encoder import LatentEncoder

        device = torch.device("cuda" if use_gpu else "cpu")
        return LatentEncoder(self.model, device=device, batch_size=self.batch_size, token=self.token)

    def load(self, shard: Shard) -> LoadedShard:
        return load_shard(self.source, shard, self.encoding.resolution)

    def encode(self, loaded: LoadedShard, encoder: LatentEncoder) -> EncodedShard:
        import torch

        try:
            posteriors = encoder.encode([row.image for row in loaded.rows])
        except torch.OutOfMemoryError as error:
            message = f"Out of GPU memory: {str(error).splitlines()[0]} Use a smaller --latents_batch_size"
            raise RunError(message) from error
        return with_posteriors(loaded, posteriors, self.encoding.dtype)

    def store(self, encoded: EncodedShard) -> ShardResult:
        return store_shard(self.folder, encoded)


def encode_here(job: EncodeJob, *, use_gpu: bool) -> Iterator[ShardResult]:
    """All shards of the job, one by one in this process."""
    encoder = job.encoder(use_gpu=use_gpu)
    for shard in job.shards:
        yield job.store(job.encode(job.load(shard), encoder))


def encode_on_ray(job: EncodeJob, resources: WorkerResources) -> Iterator[ShardResult]:
    """All shards of the job on the connected Ray cluster, in the order in which they are done."""
    import ray

    job_ref = ray.put(job)

    def tickets(_: pa.Table) -> Iterator[pa.Table]:
        for index in range(len(ray.get(job_ref).shards)):
            yield pa.table({"shard": [index]})

    def load(table: pa.Table) -> Iterator[pa.Table]:
        os.nice(max(0, LOADING_NICENESS - os.nice(0)))
        job = ray.get(job_ref)
        for index in table["shard"].to_pylist():
            yield _boxed(job.load(job.shards[index]))

    class Encode:
        encoder: LatentEncoder | None = None

        def __call__(self, table: pa.Table) -> pa.Table:
            job: EncodeJob = ray.get(job_ref)
            return _boxed(_or_error(lambda: job.encode(_unboxed(table), self.encoder or self.open(job))))

        def open(self, job: EncodeJob) -> LatentEncoder:
            import torch

            if not resources.use_gpu:
                torch.set_num_threads(resources.threads)
            self.encoder = job.encoder(use_gpu=resources.use_gpu)
            return self.encoder

    def store(table: pa.Table) -> pa.Table:
        encoded = _unboxed(table)
        return table if isinstance(encoded, Exception) else _boxed(_or_error(lambda: ray.get(job_ref).store(encoded)))

    fewest, most = resources.num_workers
    pool = ray.data.ActorPoolStrategy(min_size=fewest, max_size=most)
    actors: dict[str, Any] = {"num_cpus": resources.cpus_per_worker, "compute": pool}
    if resources.use_gpu:
        actors["num_gpus"] = 1
    if resources.accelerator_type:
        actors["accelerator_type"] = resources.accelerator_type
    whole = {"batch_format": "pyarrow", "batch_size": None}
    dataset = (
        ray.data.from_blocks([pa.table({"stream": [0]})])
        .map_batches(tickets, num_cpus=COUNT_CPUS, **whole)
        .map_batches(load, num_cpus=TASK_CPUS, **whole)
        .map_batches(Encode, **actors, **whole)
        .map_batches(store, num_cpus=COUNT_CPUS, **whole)
    )
    shard_bytes = SHARD_ROWS * 3 * job.encoding.resolution**2
    dataset.context.target_max_block_size = 1  # bytes: a block is cut after every shard
    dataset.context.enable_progress_bars = False
    ahead = max(MIN_STORE_BYTES, SHARDS_AHEAD * shard_bytes * most)
    dataset.context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=ahead)
    for table in dataset.iter_batches(prefetch_batches=0, **whole):
        result = _unboxed(table)
        if isinstance(result, Exception):
            raise result
        yield result


def _or_error(work: Callable[[], object]) -> object:
    """What `work` returns, or the error that the driver must know of: Ray Data's own would hide its cause."""
    try:
        return work()
    except (UserError, RunError, OSError) as error:
        return error


def _boxed(item: object) -> pa.Table:
    """A table of one row, so that Ray Data moves a shard as one block."""
    return pa.table({"object": pa.array([pickle.dumps(item, protocol=5)], pa.large_binary())})


def _unboxed(table: pa.Table) -> Any:
    (cell,) = table["object"]
    return pickle.loads(cell.as_buffer())
