"""Forward and backward pass of the training step as CUDA graphs: the GPU no longer waits for Python.

A step of Stable Diffusion 1.5 is thousands of operators. With small batches a GPU does each sooner than Python can ask
for the next. A graph asks for all at once: the same kernels, on the same numbers (Nguyen et al. 2021,
pytorch.org/blog/accelerating-pytorch-with-cuda-graphs).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from raycontrolnet.config.settings import StepConfig
from raycontrolnet.errors import RunError
from raycontrolnet.text import error_message

logger = logging.getLogger(__name__)

MAX_GRAPHS = 32
"""Shapes of batches that a run may have; with more of them it goes on without graphs."""
LEFT_FREE = 2
"""Copies of the gradients that must fit beside the graphs, for an update's clipping, moments and averages."""

Inputs = TypeVar("Inputs", bound=tuple[Any, ...])
"""Tuples of tensors, of tuples and dictionaries of them, and of values that are the same in all batches."""


def has_graphs(config: StepConfig, *, on_gpu: bool, num_workers: int) -> bool:
    """Check whether the steps of a run are captured; see `no_graphs_because`."""
    return no_graphs_because(config, on_gpu=on_gpu, num_workers=num_workers) is None


def no_graphs_because(config: StepConfig, *, on_gpu: bool, num_workers: int) -> str | None:
    """Return why the steps of a run are not captured, in words; None if they are.

    With several workers they have not been measured: these ask for them. With fp32, torch.compile and xformers, graphs
    have not been shown to leave the results as they are.
    """
    if not on_gpu:
        return "the run is on CPUs"
    if config.cuda_graphs == "off":
        return "--cuda_graphs off leaves them out"
    if config.mixed_precision not in ("fp16", "bf16"):
        return "they are for bf16 and fp16, and the run is in fp32"
    if config.compile:
        return "--compile leaves them out"
    if config.enable_xformers_memory_efficient_attention:
        return "--enable_xformers_memory_efficient_attention leaves them out"
    if config.cuda_graphs == "auto" and num_workers > 1:
        return f"there are {num_workers} workers; --cuda_graphs on takes them there too"
    return None


def graphs_used(graphs: GradientGraphs | None, config: StepConfig, *, on_gpu: bool, num_workers: int) -> dict[str, Any]:
    """Return what run.json says of a run's graphs: whether there were any, and why not, or not to the end."""
    if graphs is None:
        return {
            "cuda_graphs": False,
            "no_cuda_graphs_because": no_graphs_because(config, on_gpu=on_gpu, num_workers=num_workers),
        }
    never = None if graphs.replayed else "no two batches of one shape were trained"
    return {"cuda_graphs": graphs.replayed, "no_cuda_graphs_because": graphs.problem or never}


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
    replayed: bool = False
    """True once a graph has done a step."""
    _pool: Any = None
    """Handle of the memory of all graphs; None while there is none."""
    _graphs: dict[Hashable, _Graph | None] = field(default_factory=dict)
    """By shapes; None where the next batch will be captured."""
    _reached: list[torch.nn.Parameter] = field(default_factory=list)
    """The weights that get gradients."""
    _gradients: dict[torch.nn.Parameter, Tensor] = field(default_factory=dict)
    """The tensors in which the graphs sum gradients."""
    _places: list[int] = field(default_factory=list)
    """Addresses of the weights that the graphs read."""

    def add_gradients(self, add: Callable[[Inputs], Tensor], inputs: Inputs, *constants: float) -> Tensor:
        """Do `add(inputs)`, by the graph of it once there is one; return its loss, a scalar on the device.

        Args:
            add: adds to the weights' gradients and returns the loss, detached; nothing in it waits for the device.
            constants: numbers that `add` uses beside `inputs`; other ones need another graph.

        Raises:
            RunError: if `add` cannot be captured.
        """
        if self.problem:
            return add(inputs)
        key = constants, _shapes(inputs)
        if key not in self._graphs:
            return self._first(add, inputs, key)
        places = [weight.data_ptr() for weight in self.weights]
        if places != self._places:  # an optimizer may put weights elsewhere
            self.release()
            self._places = places
        self._hold_gradients()
        graph = self._graphs[key] or self._captured(add, inputs)
        if graph is None:
            return add(inputs)
        self._graphs[key] = graph
        torch._foreach_copy_(graph.inputs, _tensors(inputs))
        graph.replay()
        self.replayed = True
        return graph.loss.clone()  # the next replay writes there again

    def release(self) -> None:
        """Give back what the graphs hold of the GPU's memory; the next batches are captured again."""
        if any(self._graphs.values()):
            self._drop()

    def _drop(self) -> None:
        if self.weights[0].is_cuda:
            with suppress(RuntimeError):  # of a device that has failed, of which others tell
                torch.cuda.synchronize()  # a graph may be running
        self._graphs, self._pool, self._gradients = dict.fromkeys(self._graphs), None, {}
        torch.cuda.empty_cache()  # nothing where CUDA is not in use

    def _first(self, add: Callable[[Inputs], Tensor], inputs: Inputs, key: Hashable) -> Tensor:
        """Do a step of a shape that comes for the first time."""
        self.release()
        if len(self._graphs) == MAX_GRAPHS:
            self._give_up(f"batches have more than {MAX_GRAPHS} shapes")
        loss = add(inputs)
        self._graphs[key] = None
        self._reached = [weight for weight in self.weights if weight.grad is not None]
        return loss

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        self._drop()
        logger.warning("training goes on without CUDA graphs, more slowly at small batches: %s", problem)

    def _hold_gradients(self) -> None:
        """Let the weights' gradients be the tensors that the graphs add to, with what is in them so far."""
        empty = []
        for weight in self._reached:
            held = self._gradients.get(weight)
            if held is None:
                held = torch.zeros_like(weight) if weight.grad is None else weight.grad
                self._gradients[weight] = held
            elif weight.grad is None:
                empty.append(held)
            elif weight.grad is not held:
                held.copy_(weight.grad)
            weight.grad = held
        if empty:
            torch._foreach_zero_(empty)

    def _captured(self, add: Callable[[Inputs], Tensor], inputs: Inputs) -> _Graph | None:
        """Return the graph of `add` on copies of `inputs`; None, with a word in the log, if memory is short."""
        if self.weights[0].is_cuda:
            torch.cuda.synchronize()  # errors of the steps before are not the graph's
            self._pool = self._pool or torch.cuda.graph_pool_handle()
        found = self._tried(add, inputs)
        if isinstance(found, _Graph):
            return found
        self._give_up(found)  # now that nothing holds the attempt's tensors
        return None

    def _tried(self, add: Callable[[Inputs], Tensor], inputs: Inputs) -> _Graph | str:
        """Return the graph, or why there is none."""
        try:
            copies = tree_map_only(Tensor, torch.clone, inputs)
            replay, loss = capture(lambda: add(copies), self._pool)
        except torch.OutOfMemoryError as error:
            return error_message(error, 200)
        except RuntimeError as error:
            # torch leaves its allocator as in a capture: nothing can go on in this process.
            said = f"The step cannot be captured in a CUDA graph: {error_message(error, 200)}"
            raise RunError(f"{said}; add --cuda_graphs off") from error
        needed = LEFT_FREE * sum(each.nbytes for each in self._gradients.values())
        if free_bytes(self.weights[0].device) < needed:
            return f"less than the {needed / 2**30:.1f} GiB that an update needs would be left beside them"
        return _Graph(replay, _tensors(copies), loss)


def capture(function: Callable[[], Tensor], pool: Any) -> tuple[Callable[[], None], Tensor]:
    """Capture a function in a CUDA graph; return how to replay it, and the tensor that is then written.

    Args:
        pool: handle of the memory to work in, `torch.cuda.graph_pool_handle`.

    Raises:
        RuntimeError: if it cannot be captured: it waits for the device.
        torch.OutOfMemoryError: if memory is short, after which the process can go on.
    """
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream()
    try:
        # Other threads go on copying batches meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = function()
    finally:
        torch.cuda.set_stream(before)  # torch does not, where the end of the capture fails
    return graph.replay, result


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU that this process could still take."""
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free, allowed - torch.cuda.memory_reserved(device))


def _tensors(value: Any) -> list[Tensor]:
    """Return a nest's tensors, in order."""
    return [each for each in tree_leaves(value) if isinstance(each, Tensor)]


def _shapes(value: Any) -> Hashable:
    """Return what is in a nest, with shapes and dtypes in place of the tensors."""
    return tuple((each.shape, each.dtype) if isinstance(each, Tensor) else each for each in tree_leaves(value))
