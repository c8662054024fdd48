"""Uses of an image above which a run caches its latents by itself, by the device that it trains on."""

from __future__ import annotations

from dataclasses import replace

import torch

from raycontrolnet.cluster.gpus import LEAST_CAPABILITY, first_gpu_here
from raycontrolnet.cluster.session import runs_on_a_cluster
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.launch.precision import BF16, NO
from raycontrolnet.model.families.family import Family
from raycontrolnet.model.performance import working_precision
from raycontrolnet.predict.devices import TYPICAL, Peak, peak_of

ENOUGH_USES = 1.1
"""Uses of an image above which latents are cached, where the VAE is as fast for the cache as in a step. An image that
is used r times is encoded once in place of r times. The VAE is a third of a step's work (1.1 of 3.4 TFLOP for Stable
Diffusion 1.5 at 512 px), so that a cache saves (r - 1) / 3r of a run: 3% here, about what it costs to read each image
once more, to write, and to load the VAE. The last batch of an epoch is filled from the next one: even a run of one
epoch has r a little above 1."""


def enough_uses(train: TrainConfig, family: Family, gpu: Peak | None) -> float:
    """Return the uses of an image above which its latents are cached.

    The cache is encoded in fp32 without TF32, once for each image, and once for its mirror image. From pixels the VAE
    runs at each use, but in the precision of training. The ratio of the GPU's peaks says how many uses take as long.

    Args:
        train: the settings, with the precision of the run.
        gpu: peaks of a worker's GPU; None for CPUs.
    """
    if gpu is None:
        return ENOUGH_USES
    named = train.pretrained_vae_model_name_or_path is not None
    dtype = family.vae_dtype(working_precision(train.mixed_precision), named=named)
    faster = gpu.of(dtype, allow_tf32=train.allow_tf32) / gpu.fp32
    return ENOUGH_USES if faster <= 1 else faster * (2 if train.random_flip else 1)


def likely_enough_uses(train: TrainConfig, family: Family, trained: str | None = None) -> float:
    """Return `enough_uses` on the GPU, and in the precision, that a run will probably have before Ray has started.

    Args:
        trained: precision of the part of the training that goes on.
    """
    elsewhere = runs_on_a_cluster(train)
    on_gpu = elsewhere or torch.cuda.is_available() if train.use_gpu is None else train.use_gpu
    if not on_gpu:
        return ENOUGH_USES
    name, capability = (None if elsewhere else first_gpu_here()) or ("", LEAST_CAPABILITY)
    default = BF16 if capability >= LEAST_CAPABILITY else NO
    precision = train.mixed_precision or trained or default
    gpu = peak_of(train.accelerator_type or name) or TYPICAL
    return enough_uses(replace(train, mixed_precision=precision), family, gpu)
