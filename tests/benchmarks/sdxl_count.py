"""Work and memory of a training step of Stable Diffusion XL, counted: nothing is computed, no weights are needed.

    python tests/benchmarks/sdxl_count.py [--resolution 1024] [--batch_sizes 1 2 3 4]

The step is that of `raycontrolnet train` in bf16, on models of SDXL's published sizes whose tensors have shapes and
types alone, as `raycontrolnet check` counts it. A GPU needs more: its context, the kernels' workspaces, and gaps
between blocks, 1 to 3 GB together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))

from full_size import SDXL
from predictions import predicted


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 3, 4])
    args = parser.parse_args(arguments)
    one = partial(predicted, SDXL, torch.bfloat16, resolution=args.resolution)
    from_cache, from_pixels = (one(train_batch_size=1, cached=cached) for cached in (True, False))
    print("| Part | Weights |\n|---|---|")
    for name, number in from_cache.weights.items():
        print(f"| {name} | {number / 1e6:,.0f} M |")
    flop = [each.flop_per_sample / 1e12 for each in (from_cache, from_pixels)]
    print(
        f"\nAt {args.resolution} px an image takes {flop[0]:.2f} TFLOP from cached latents, {flop[1]:.2f} from pixels."
    )
    print()
    print("| Batch | Checkpointing, AdamW | Checkpointing, 8-bit Adam | AdamW | 8-bit Adam |\n|---|---|---|---|---|")
    for size in args.batch_sizes:
        cells = []
        for checkpointed in (True, False):
            found = one(train_batch_size=size, gradient_checkpointing=checkpointed)
            cells += [f"{each.total(size) / 1e9:.1f} GB" for each in (found, found.with_8bit_adam())]
        print(f"| {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
