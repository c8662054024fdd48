"""Gradients averaged over the workers of a run, part by part, while the backward pass computes the rest.

As DistributedDataParallel does (Li et al. 2020, arXiv:2006.15704), for a backward pass that may be a CUDA graph: the
device tells what is computed, by events that the graph records, and not Python.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed

BUCKET_BYTES = 64 * 2**20
"""Bytes of gradients that are sent at a time; few, so that a network's delays do not add up."""


@dataclass
class _Bucket:
    """Weights whose gradients are sent together."""

    weights: list[torch.nn.Parameter]
    computed: torch.cuda.Event | None
    """Recorded on the device once the gradients are there; None on a CPU, where nothing is asynchronous."""
    missing: int = 0
    """Gradients that the backward pass still has to compute."""

    def note_computed(self) -> None:
        if self.computed:
            self.computed.record()


@dataclass(eq=False)
class GradientAverage:
    """The gradients' average over the workers, of the same weights in all of them.

    Weights without a gradient, in all workers alike, are left alone.
    """

    weights: Sequence[torch.nn.Parameter]
    """The weights that are trained; those of worker 0 are copied to the others."""
    _buckets: list[_Bucket] = field(init=False)
    _of: dict[torch.nn.Parameter, _Bucket] = field(init=False)
    _stream: torch.cuda.Stream | None = None
    """Place of the copies and of waiting for the other workers, beside the backward pass."""

    def __post_init__(self) -> None:
        trained = [weight for weight in self.weights if weight.requires_grad]
        device = trained[0].device
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        # From the last to the first, about as they are computed.
        self._buckets = [_Bucket(each, _event(device)) for each in _parts(trained[::-1], BUCKET_BYTES)]
        self._of = {weight: bucket for bucket in self._buckets for weight in bucket.weights}
        computed = _weakly(self._computed)
        for weight in trained:
            weight.register_post_accumulate_grad_hook(computed)
            distributed.broadcast(weight.detach(), src=0)

    def _computed(self, weight: Tensor) -> None:
        bucket = self._of[weight]  # type: ignore[index]  # a hook is given its own weight
        bucket.missing -= 1
        if bucket.missing == 0:
            bucket.note_computed()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note on the device when which gradients are there; around each backward pass, in a capture or not."""
        for bucket in self._buckets:
            bucket.missing = len(bucket.weights)
        yield
        for bucket in self._buckets:
            if bucket.missing:  # of weights without gradients
                bucket.note_computed()

    def average(self) -> None:
        """Put the workers' average in the place of this one's gradients, after an update's last backward pass.

        All workers call it. On a GPU it returns at once, and what comes next there waits for it.
        """
        here = torch.cuda.current_stream() if self._stream else None
        with torch.cuda.stream(self._stream):  # which does nothing without one
            for bucket in self._buckets:
                if self._stream and bucket.computed:
                    self._stream.wait_event(bucket.computed)
                _average([weight for weight in bucket.weights if weight.grad is not None])
        if here and self._stream:
            here.wait_stream(self._stream)


def _weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """Return a function that calls a method as long as its object is there: a hook would keep it, and all weights."""
    reference = weakref.WeakMethod(method)

    def call(weight: Tensor) -> None:
        if found := reference():
            found(weight)

    return call


def _average(weights: Sequence[torch.nn.Parameter]) -> None:
    """Put the average over the workers in the place of the gradients of weights of one dtype, sent as one tensor."""
    if not weights:
        return
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    sizes = [weight.numel() for weight in weights]
    together = torch.empty(sum(sizes), dtype=weights[0].dtype, device=weights[0].device)
    # In the weights' layouts, which are the same in all workers.
    parts = zip(together.split(sizes), weights, strict=True)
    places = [part.as_strided(weight.shape, weight.stride()) for part, weight in parts]
    torch._foreach_copy_(places, gradients)
    together /= distributed.get_world_size()
    distributed.all_reduce(together)
    torch._foreach_copy_(gradients, places)


def _parts(weights: Sequence[torch.nn.Parameter], most_bytes: int) -> Iterator[list[torch.nn.Parameter]]:
    """Split weights, in order, into lists of one dtype of at most `most_bytes`, or of one weight."""
    part: list[torch.nn.Parameter] = []
    for weight in weights:
        if part and (weight.dtype != part[0].dtype or sum(each.nbytes for each in (*part, weight)) > most_bytes):
            yield part
            part = []
        part.append(weight)
    if part:
        yield part


def _event(device: torch.device) -> torch.cuda.Event | None:
    """Return an event that streams outside of a graph may wait for when the graph records it."""
    return torch.cuda.Event(external=True) if device.type == "cuda" else None
