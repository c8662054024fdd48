"""Bytes that a step of Stable Diffusion 1.5 moves on a GPU, by operators' and kernels' arguments, and its TFLOP.

    PYTHONPATH=.:tests python tests/benchmarks/step_bytes.py --batch_size 48 --gb_per_second 3600

Counted on shapes, from cached latents at 512 px in bf16: no GPU, no weights. What a kernel reads twice, or an operator
keeps in registers, is not known here; what the optimizer moves is not counted.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from full_size import SD15
from kernel_calls import Kernel, launches_noted
from predictions import predicted
from torch.utils._pytree import tree_leaves

from raycontrolnet.predict.count import FORMULAS, StepCounter

PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "convolution", "convolution_backward")
VIEWS = {
    "view", "_unsafe_view", "permute", "transpose", "t", "expand", "unsqueeze", "slice", "select", "detach", "alias",
    "split", "chunk", "unbind", "as_strided", "squeeze", "empty", "empty_like", "new_empty", "split_with_sizes",
    "empty_strided",
}  # fmt: skip
"""Operators that move nothing."""
ONE_PIXEL = ("group_norm_kernels.group_moments",)
"""Kernels that read one pixel of their first argument."""


def moved(values: Any) -> int:
    """Return the bytes of the tensors in some values, each once."""
    tensors = {id(each): each for each in tree_leaves(values) if isinstance(each, torch.Tensor)}
    return sum(each.numel() * each.element_size() for each in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--gb_per_second", type=float, default=3600.0, help="of the device's memory")
    args = parser.parse_args()
    found, flop, dispatch = Counter[str](), Counter[str](), StepCounter.__torch_dispatch__

    def counted(counter: StepCounter, func: Any, types: Any, values: Any = (), options: Any = None) -> Any:
        result = dispatch(counter, func, types, values, options)
        if (name := func.overloadpacket.__name__) not in VIEWS:
            found[name] += moved((values, options, result))
        if formula := FORMULAS.get(func.overloadpacket):
            flop[name] += formula(*values, **(options or {}), out_val=result)
        return result

    def note(kernel: Kernel, arguments: tuple[Any, ...]) -> None:
        whole = arguments[1:] if kernel.name in ONE_PIXEL else arguments
        found[f"kernel {kernel.name}"] += moved(whole)

    with launches_noted(note, args.batch_size), patch.object(StepCounter, "__torch_dispatch__", counted):
        predicted(SD15, torch.bfloat16, on_gpu=True, mixed_precision="bf16")
    for name, number in found.most_common(30):
        print(f"{name:60s} {number / 1e9:8.2f} GB {number / 1e6 / args.gb_per_second:7.2f} ms", end="")
        print(f" {flop[name] / 1e12:7.1f} TFLOP" if name in flop else "")
    heavy = sum(number for name, number in found.items() if name in PRODUCTS or name.startswith("_scaled_dot"))
    light = found.total() - heavy
    print(f"products, convolutions and attention {heavy / 1e9:.1f} GB, {flop.total() / 1e12:.1f} TFLOP; ", end="")
    print(f"all others {light / 1e9:.1f} GB, {light / 1e6 / args.gb_per_second:.1f} ms")


if __name__ == "__main__":
    main()
