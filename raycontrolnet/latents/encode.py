"""Encoding: shards in, files of the latent cache out; by Ray Data, or in this process.

load (tasks on CPUs)  ->  encode (a pool of actors, on GPUs or CPUs)  ->  store (tasks)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import pyarrow as pa

from raycontrolnet.cluster.blocks import WHOLE_BLOCKS, catch, from_block, generate, results, to_block
from raycontrolnet.cluster.cpus import COUNT_CPUS, TASK_CPUS, let_training_go_first
from raycontrolnet.config.checks import check_device
from raycontrolnet.config.cluster_settings import ClusterConfig
from raycontrolnet.latents.manifest import SHARD_ROWS, Shard
from raycontrolnet.latents.shards import EncodeJob, ShardResult

if TYPE_CHECKING:
    import ray

    from raycontrolnet.cluster.resources import WorkerResources
    from raycontrolnet.latents.encoder import LatentEncoder

SHARDS_AHEAD = 3
"""Loaded shards per actor that may wait in Ray's object store: one in work, one next, one being made."""
MIN_STORE_BYTES = 64 * 2**20


def encode_here(job: EncodeJob, shards: Sequence[Shard], cluster: ClusterConfig) -> Iterator[ShardResult]:
    """Encode the shards one by one in this process."""
    import torch

    use_gpu = check_device(cluster.use_gpu, has_gpu=torch.cuda.is_available(), work="encode")
    encoder = job.encoder(use_gpu=use_gpu)
    for shard in shards:
        yield job.store(job.encode(job.load(shard), encoder))


def encode_on_ray(job: EncodeJob, shards: Sequence[Shard], resources: WorkerResources) -> Iterator[ShardResult]:
    """Encode the shards on the connected Ray; yield each when it is done."""
    import ray

    shards_ref, job_ref = ray.put(shards), ray.put(job)
    fewest, most = (min(workers, len(shards)) for workers in resources.num_workers)
    with_job = {"fn_kwargs": {"job_ref": job_ref}} | WHOLE_BLOCKS
    dataset = (
        generate(_shards, shards_ref)
        .map_batches(_load, num_cpus=TASK_CPUS, **with_job)
        .map_batches(
            _Encoder,
            compute=ray.data.ActorPoolStrategy(min_size=fewest, max_size=most),
            fn_constructor_args=(job_ref, resources),
            **resources.actor_options,
            **WHOLE_BLOCKS,
        )
        .map_batches(_store, num_cpus=COUNT_CPUS, **with_job)
    )
    shard_bytes = SHARD_ROWS * 3 * job.encoding.resolution**2
    ahead = max(MIN_STORE_BYTES, SHARDS_AHEAD * shard_bytes * most)
    dataset.context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=ahead)
    yield from results(dataset)


def _shards(shards_ref: ray.ObjectRef[Sequence[Shard]]) -> Iterator[Shard]:
    import ray

    return iter(ray.get(shards_ref))


def _load(table: pa.Table, job_ref: ray.ObjectRef[EncodeJob]) -> pa.Table:
    import ray

    let_training_go_first()
    return to_block(catch(ray.get(job_ref).load, from_block(table)))


class _Encoder:
    """An actor with the VAE. It loads it with its first shard, so that a failure is reported as any other."""

    def __init__(self, job_ref: ray.ObjectRef[EncodeJob], resources: WorkerResources):
        import ray

        self.job, self.resources = ray.get(job_ref), resources

    def __call__(self, table: pa.Table) -> pa.Table:
        return to_block(catch(lambda loaded: self.job.encode(loaded, self.encoder), from_block(table)))

    @cached_property
    def encoder(self) -> LatentEncoder:
        import torch

        if not self.resources.use_gpu:
            torch.set_num_threads(self.resources.threads)
        return self.job.encoder(use_gpu=self.resources.use_gpu)


def _store(table: pa.Table, job_ref: ray.ObjectRef[EncodeJob]) -> pa.Table:
    import ray

    return to_block(catch(ray.get(job_ref).store, from_block(table)))
