"""Optimizers by the name of their class: looked up, tried on small weights, and their state counted."""

from __future__ import annotations

import inspect
import io
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any

import torch
from torch.optim import Optimizer

from raycontrolnet.config.checks import package_problem
from raycontrolnet.config.named_values import read_named_values
from raycontrolnet.config.optimizer_settings import ADAMW, ADAMW_8BIT
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.errors import UserError
from raycontrolnet.text import error_message, perhaps

logger = logging.getLogger(__name__)

MOMENTS = {False: 8, True: 2}
"""`use_8bit_adam` -> bytes of AdamW's moments for each weight."""
KINDS_OF_WEIGHTS = ((8, 4, 3, 3), (8, 8), (8,))
"""Shapes of a ControlNet's weights, but for their sizes: convolutions, matrices, biases and norms."""
LEAST = ((128, 128),)
"""Shape of the weights of which optimizers keep least."""
COUNTED_SIZE = 128
"""Largest side of the weights that are tried for a count; bitsandbytes keeps fp32 for fewer than 4,096 numbers."""


def arguments_of(config: TrainConfig) -> dict[str, Any]:
    """Return the arguments of `--optimizer_args`, with tuples for lists."""
    return {name: _as_tuple(value) for name, value in read_named_values(config.optimizer_args or "").items()}


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def optimizer_class(name: str) -> type[Optimizer]:
    """Return the class that `--optimizer` names.

    Raises:
        UserError: there is none, or it is no optimizer of PyTorch's kind.
    """
    flag, (module_name, _, class_name) = f"--optimizer={name}", name.rpartition(".")
    package = module_name.partition(".")[0]
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if find_spec(package) is None:
            raise UserError(
                f"{flag}: {package} is not installed; run pip install {package}, or the package that has it"
            ) from None
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise UserError(f"{flag}: {package} has no module {missing}{_nearest_module(missing)}") from None
        raise UserError(f"{flag}: needs {missing}, which is not installed; run pip install {missing}") from None
    except Exception as error:
        raise UserError(f"{flag}: {module_name} cannot be imported ({error_message(error, 200)})") from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        names = [
            each for each, value in vars(module).items() if isinstance(value, type) and issubclass(value, Optimizer)
        ]
        problem = "has no" if found is None else "has no optimizer of PyTorch's (torch.optim.Optimizer) called"
        advice = perhaps(class_name, names) or f"; python -m pydoc {module_name} lists its classes"
        raise UserError(f"{flag}: {module_name} {problem} {class_name}{advice}")
    return found


def _nearest_module(missing: str) -> str:
    """Return a hint at the module beside `missing` that has nearly its name; empty without one."""
    parent, _, name = missing.rpartition(".")
    folders = getattr(import_module(parent), "__path__", [])
    return perhaps(name, [each.name for each in iter_modules(folders)]).replace("meant ", f"meant {parent}.")


def class_of(config: TrainConfig) -> type[Optimizer]:
    """Return the class of the settings' optimizer.

    Raises:
        UserError: there is none, or it is no optimizer of PyTorch's kind.
    """
    if not config.use_8bit_adam:
        return optimizer_class(config.optimizer)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(package_problem("use_8bit_adam", True) or str(error)) from None
    found: type[Optimizer] = bitsandbytes.optim.AdamW8bit
    return found


def new_optimizer(
    parameters: Sequence[torch.nn.Parameter], config: TrainConfig, learning_rate: float, **options: Any
) -> Optimizer:
    """Return an optimizer of the class and with the arguments of the settings.

    Args:
        parameters: the weights to train.
        config: the settings.
        learning_rate: after `scale_lr`.
        options: other arguments, where the settings say nothing.

    Raises:
        UserError: there is no such class, or it takes no such arguments or weights.
    """
    found = class_of(config)
    try:
        return found(parameters, lr=learning_rate, **options | arguments_of(config))  # type: ignore[call-arg]
    except Exception as error:
        raise UserError(_complaint(config, found, error)) from error


def _place(config: TrainConfig) -> str:
    """Return the flags of the optimizer and its arguments, with their values."""
    place = "--use_8bit_adam" if config.use_8bit_adam else f"--optimizer={config.optimizer}"
    return place + (f", --optimizer_args={config.optimizer_args}" if config.optimizer_args else "")


def _documentation(config: TrainConfig) -> str:
    """Return the advice to look up which values the class takes."""
    name = ADAMW_8BIT if config.use_8bit_adam else config.optimizer
    return f"check them against the class's documentation: python -m pydoc {name}"


def _complaint(config: TrainConfig, found: type[Optimizer], error: Exception) -> str:
    """Return what is wrong with an optimizer that could not be made."""
    names = [argument for argument in constructor_arguments(found) if argument != "lr"]
    problem, listed = error_message(error, 200), f"; its arguments: {', '.join(names)}" if names else ""
    own_words = isinstance(error, (ValueError, NotImplementedError)) or not config.optimizer_args
    if own_words or not set(arguments_of(config)) <= set(names):  # Python's words are clear for an unknown argument
        return f"{_place(config)}: {problem}{listed}"
    return f"{_place(config)}: these values cannot be used ({problem}); {_documentation(config)}"


def constructor_arguments(found: type[Optimizer]) -> list[str]:
    """Return the names of the arguments that a class takes, without the weights."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = list(inspect.signature(found).parameters.values())
    return [each.name for each in parameters[1:] if each.kind in named]


def try_optimizer(config: TrainConfig, device: torch.device | None = None) -> None:
    """Try the optimizer of the settings on small weights: an update, and its state through a checkpoint.

    Args:
        device: the device to train on; without it, what may fail on CPUs alone is left to the workers.

    Raises:
        UserError: it cannot be used.
    """
    if config.optimizer == ADAMW and not config.optimizer_args:
        return
    if config.use_8bit_adam and find_spec("bitsandbytes") is None:  # said by `missing_extras`
        return
    optimizer = _tried(config, KINDS_OF_WEIGHTS, device)
    found = type(optimizer)
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure and closure.default is inspect.Parameter.empty:
        problem = "needs a closure in its step, which training here does not have; take another class"
        raise UserError(f"--optimizer={config.optimizer}: {problem}")
    if callable(getattr(optimizer, "eval", None)):
        problem = "switches the weights for every measure (eval), which training here does not do; take another class"
        raise UserError(f"--optimizer={config.optimizer}: {problem}, or --use_ema for averages")
    try:
        optimizer.step()
        with io.BytesIO() as file:
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
    except Exception as error:
        problem = f"{_place(config)}: its update or state fails ({error_message(error, 200)})"
        if device is None and not _is_torchs(found.__module__) and config.use_gpu is not False:
            logger.warning("%s on this CPU; the workers' GPUs decide", problem)
            return
        advice = f"its values may be to blame, {_documentation(config)}; or " if config.optimizer_args else ""
        raise UserError(f"{problem}; {advice}take another class") from error


def state_problem(config: TrainConfig, settings: Any) -> str | None:
    """Return why a checkpoint's optimizer cannot go on with these settings; None if it can, as far as is known.

    Args:
        config: the settings now.
        settings: those in the checkpoint's manifest, which older ones may lack.
    """
    if not isinstance(settings, Mapping):
        return None
    in_8bit = bool(settings.get("use_8bit_adam", False))
    before = ADAMW_8BIT if in_8bit else str(settings.get("optimizer", ADAMW))
    now = ADAMW_8BIT if config.use_8bit_adam else config.optimizer
    if _short(before) == _short(now):
        return None
    flag = "--use_8bit_adam" if in_8bit else f"--optimizer {before}"
    return f"holds the state of {before}, and the optimizer is {now}; go on with {flag}"


def _short(name: str) -> tuple[str, str]:
    """Return package and class, which the same class has under all its modules' names."""
    return name.partition(".")[0], name.rpartition(".")[2]


def _is_torchs(name: str) -> bool:
    return name.startswith("torch.")


def keeps_layouts(config: TrainConfig) -> bool:
    """Check that the optimizer takes weights in any memory layout: bitsandbytes' kernels know one, others may."""
    return not config.use_8bit_adam and _is_torchs(config.optimizer)


def fuses(config: TrainConfig, device: torch.device) -> bool:
    """Check that one kernel of a GPU can update all weights, for a class of PyTorch's, as Adam, SGD and Adagrad."""
    takes = device.type != "cpu" and _is_torchs(config.optimizer) and "fused" in constructor_arguments(class_of(config))
    if not takes:
        return False
    try:
        _tried(config, KINDS_OF_WEIGHTS, device, fused=True).step()
    except (RuntimeError, UserError):  # other arguments, as differentiable, or the device have none
        return False
    return True


def copies_weights(config: TrainConfig) -> bool:
    """Check that an update on a GPU makes a copy of all weights: by a few kernels for all of them (foreach).

    A fused one makes none, nor do classes that take one weight after the other.
    """
    if config.use_8bit_adam:
        return False
    names, chosen = constructor_arguments(class_of(config)), arguments_of(config)
    if "foreach" in chosen or "fused" in chosen:  # with either, PyTorch takes the other for False
        return bool(chosen.get("foreach"))
    is_fused = _is_torchs(config.optimizer) and "fused" in names and config.mixed_precision != "fp16"
    return "foreach" in names and not is_fused


def _tried(
    config: TrainConfig, shapes: Iterable[Sequence[int]], device: torch.device | None = None, **options: Any
) -> Optimizer:
    """Return the optimizer of the settings for new weights of `shapes`, with gradients."""
    weights = [torch.nn.Parameter(torch.full(tuple(shape), 0.1, device=device)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.01)
    return new_optimizer(weights, config, config.learning_rate, **options)


def state_bytes_per_weight(config: TrainConfig, shapes: Iterable[Sequence[int]] = LEAST) -> float:
    """Count the bytes of an optimizer's state for each weight, by an update of small weights.

    Args:
        shapes: of the weights that are trained; their larger sides are taken as `COUNTED_SIZE`.

    Returns:
        AdamW's 8 for an optimizer that cannot be tried here.
    """
    if config.use_8bit_adam or (config.optimizer == ADAMW and not config.optimizer_args):
        return MOMENTS[config.use_8bit_adam]
    numbers: dict[tuple[int, ...], int] = {}
    for shape in shapes:
        small = tuple(min(side, COUNTED_SIZE) for side in shape)
        numbers[small] = numbers.get(small, 0) + math.prod(shape)
    try:
        optimizer = _tried(config, numbers)
        optimizer.step()
    except Exception:
        logger.warning("the state of %s is not counted", config.optimizer, exc_info=True)
        return MOMENTS[False]
    weights = optimizer.param_groups[0]["params"]
    each = (sum(_bytes(optimizer.state[weight])) / weight.numel() for weight in weights)
    counted = sum(size * number for size, number in zip(each, numbers.values(), strict=True))
    return counted / sum(numbers.values())


def _bytes(value: Any) -> Iterator[int]:
    """Yield the bytes of the tensors in `value`, without single numbers."""
    if isinstance(value, torch.Tensor):
        yield value.numel() * value.element_size() if value.dim() else 0
    elif isinstance(value, (Mapping, list, tuple)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _bytes(each)
