"""Advice for a run that is out of GPU memory: the flags that need less and are not in use yet."""

from __future__ import annotations

from collections.abc import Iterator

from raycontrolnet.cluster.worker import gpu_share
from raycontrolnet.config.checks import missing_package
from raycontrolnet.config.optimizer_settings import ADAMW
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.model.graphs import has_graphs
from raycontrolnet.model.performance import has_bf16
from raycontrolnet.training.job import Job


def advice_for(job: Job, num_workers: int) -> str:
    """Return the advice for a worker of a job, one of `num_workers`, on whose GPU memory has run out."""
    return memory_advice(
        job.config, cached=job.cached, num_workers=num_workers, share=gpu_share(), bf16=not job.use_gpu or has_bf16()
    )


def memory_advice(config: TrainConfig, *, cached: bool, num_workers: int, share: float, bf16: bool) -> str:
    """Return the flags that bring the settings into less memory, in a sentence without its full stop.

    Args:
        cached: the run trains from cached latents.
        num_workers: workers of the run.
        share: the process's part of the GPU, in (0, 1].
        bf16: the GPU has bf16.
    """
    flags = list(_flags(config, cached=cached, num_workers=num_workers, share=share, bf16=bf16))
    if not flags:
        return "No flag is left that needs less: take a smaller --resolution, or a GPU with more memory"
    listed = f"{', '.join(flags[:-1])} or {flags[-1]}" if flags[1:] else flags[0]
    return f"Less is needed with {listed}; `raycontrolnet check` with the run's flags predicts how much"


def _flags(config: TrainConfig, *, cached: bool, num_workers: int, share: float, bf16: bool) -> Iterator[str]:
    size, steps = config.train_batch_size, config.gradient_accumulation_steps
    if share < 1:
        yield f"more than {share:g} of a GPU (--gpus_per_trial)"
    if not config.gradient_checkpointing:
        yield "--gradient_checkpointing"
    if size > 1:
        less = max(part for part in range(1, size) if size % part == 0)
        accumulation = f"--gradient_accumulation_steps {steps * size // less}"
        yield f"--train_batch_size {less} {accumulation} (as many samples an update)"
    if config.mixed_precision in (None, "no"):
        yield f"--mixed_precision {'bf16' if bf16 else 'fp16'}"
    if not config.use_8bit_adam and config.optimizer == ADAMW:
        missing = missing_package("use_8bit_adam")
        yield f"--use_8bit_adam ({missing})" if missing else "--use_8bit_adam"
    if not cached:
        yield "--cache_latents on"
    # Gradients stay during an accumulation, and DDP's buckets hold them always.
    given_back = steps == 1 and num_workers == 1
    held = ["--set_grads_to_none"] if given_back and not config.set_grads_to_none else []
    # Graphs hold gradients, too, and activations while averages are updated.
    if (given_back or config.use_ema) and has_graphs(config, on_gpu=True, num_workers=num_workers):
        held.append("--cuda_graphs off")
    if held:
        yield " ".join(held)
