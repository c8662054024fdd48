"""Forward and backward pass of the training step as CUDA graphs: the GPU no longer waits for Python.

A step of Stable Diffusion 1.5 is about 20,000 operators. With small batches a GPU does each sooner than Python can ask
for the next. A graph asks for all at once: the same kernels, on the same numbers (Nguyen et al. 2021,
pytorch.org/blog/accelerating-pytorch-with-cuda-graphs).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from raycontrolnet.text import error_message

logger = logging.getLogger(__name__)

MAX_GRAPHS = 32
"""Shapes of batches that a run may have; with more of them it goes on without graphs."""

Inputs = TypeVar("Inputs", bound=tuple[Any, ...])
"""Tuples of tensors and None, of tuples and dictionaries of them."""


class _Graph(NamedTuple):
    replay: Callable[[], None]
    inputs: list[Tensor]
    """The tensors that it reads, beside the models' weights."""
    loss: Tensor
    """The tensor that it writes, beside the gradients."""


@dataclass
class GradientGraphs:
    """The graphs of a run, one for each shape of a batch.

    The first batch of a shape runs without, so that kernels are chosen and compiled. The next is captured. All graphs
    work in the same memory, one after the other. Nobody else can use it, so a step without a graph has it back first.
    """

    weights: Sequence[torch.nn.Parameter]
    """The weights that are trained."""
    problem: str | None = None
    """Reason why nothing is captured any more; None while it is."""
    _pool: Any = None
    """Handle of the memory of all graphs; None while there is none."""
    _graphs: dict[Hashable, _Graph | None] = field(default_factory=dict)
    """By shapes; None where the next batch will be captured."""
    _gradients: dict[torch.nn.Parameter, Tensor] = field(default_factory=dict)
    """The tensors in which gradients are summed, of the weights that get any."""

    def add_gradients(self, add: Callable[[Inputs], Tensor], inputs: Inputs, *constants: float) -> Tensor:
        """Do `add(inputs)`, by the graph of it once there is one; return its loss, a scalar on the device.

        Args:
            add: adds to the weights' gradients and returns the loss, detached; nothing in it waits for the device.
            constants: numbers that `add` uses beside `inputs`; other ones need another graph.
        """
        key = constants, _shapes(inputs)
        if self._gradients:
            self._hold_gradients()
        if key not in self._graphs or self.problem:
            return self._without_graph(add, inputs, key)
        graph = self._graphs[key] or self._captured(add, inputs)
        if graph is None:
            return add(inputs)
        self._graphs[key] = graph
        torch._foreach_copy_(graph.inputs, _tensors(inputs))
        graph.replay()
        return graph.loss.clone()  # the next replay writes there again

    def release(self) -> None:
        """Give back what the graphs hold of the GPU's memory; the next batches are captured again."""
        if any(self._graphs.values()):
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # one of them may be running
            self._graphs, self._pool = dict.fromkeys(self._graphs), None
            torch.cuda.empty_cache()

    def _without_graph(self, add: Callable[[Inputs], Tensor], inputs: Inputs, key: Hashable) -> Tensor:
        self.release()
        if not self.problem and len(self._graphs) == MAX_GRAPHS:
            self._give_up(f"batches have more than {MAX_GRAPHS} shapes")
        loss = add(inputs)
        self._graphs.setdefault(key)
        if not self._gradients:
            self._gradients = {each: torch.zeros_like(each) for each in self.weights if each.grad is not None}
        return loss

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        self.release()
        logger.warning("training goes on without CUDA graphs, more slowly at small batches: %s", problem)

    def _hold_gradients(self) -> None:
        """Let the weights' gradients be the tensors that the graphs add to, with what is in them so far."""
        without = [held for weight, held in self._gradients.items() if weight.grad is None]
        if without:
            torch._foreach_zero_(without)
        for weight, held in self._gradients.items():
            if weight.grad is not None and weight.grad is not held:
                held.copy_(weight.grad)
            weight.grad = held

    def _captured(self, add: Callable[[Inputs], Tensor], inputs: Inputs) -> _Graph | None:
        """Return the graph of `add` on copies of `inputs`; None, with a word in the log, if that fails."""
        try:
            if self._pool is None and torch.cuda.is_available():
                self._pool = torch.cuda.graph_pool_handle()
            copies = _mapped(inputs, torch.clone)
            replay, loss = capture(lambda: add(copies), self._pool)
        except RuntimeError as error:
            self._give_up(f"{type(error).__name__}: {error_message(error, 200)}")
            return None
        return _Graph(replay, _tensors(copies), loss)


def capture(function: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], None], Tensor]:
    """Capture a function in a CUDA graph; return how to replay it, and the tensor that is then written.

    Args:
        pool: handle of the memory to work in, `torch.cuda.graph_pool_handle`.

    Raises:
        RuntimeError: if it cannot be captured: it waits for the device, or memory is short.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads go on copying batches meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


def _mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return tuples and dictionaries, nested, with a function's results in place of their tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: _mapped(each, function) for name, each in value.items()}
    items = [_mapped(each, function) for each in value]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def _parts(value: Any) -> Iterable[Any]:
    """Return what is in a tuple or a dictionary, in order; None is empty."""
    return () if value is None else value.values() if isinstance(value, dict) else value


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors, in order."""
    return [value] if isinstance(value, Tensor) else [tensor for each in _parts(value) for tensor in _tensors(each)]


def _shapes(value: Any) -> Hashable:
    """Return shapes and dtypes in place of the tensors, without names."""
    return (value.shape, value.dtype) if isinstance(value, Tensor) else tuple(map(_shapes, _parts(value)))
