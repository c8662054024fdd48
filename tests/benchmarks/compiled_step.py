"""CPU seconds of a step's forward and backward pass on one thread, with and without torch.compile.

    PYTHONPATH=.:tests:tests/gpu python tests/benchmarks/compiled_step.py

Stable Diffusion 1.5 in full size with random weights, 256 px, fp32, batch 2, from cached latents. Needs 16 GB of memory
and, for the compiler, ten minutes.
"""

from __future__ import annotations

import time

import torch
from full_size import SD15
from states import components_of, draws_of, random_batch, settings

from raycontrolnet.model.performance import compile_models
from raycontrolnet.model.step import controlnet_loss
from raycontrolnet.training.host_memory import freed_memory_kept

CPU = torch.device("cpu")
SIZE, RESOLUTION, STEPS = 2, 256, 3


def main() -> None:
    torch.set_num_threads(1)
    with freed_memory_kept(on_cpu=True):
        components = components_of(SD15, settings(train_batch_size=SIZE), CPU)
        batch = random_batch(components, SIZE, RESOLUTION, CPU, cached=True)
        draws = draws_of(components, 0, SIZE, RESOLUTION, CPU)

        def step() -> tuple[float, float]:
            started, wall = time.process_time(), time.perf_counter()
            components.controlnet.zero_grad()
            controlnet_loss(components, components.controlnet, batch, draws).mean().backward()
            return round(time.process_time() - started, 2), round(time.perf_counter() - wall, 2)

        print("as it is: CPU and wall seconds", *(step() for _ in range(STEPS + 1)), flush=True)
        compile_models(components)
        print("compiled, first:", step(), flush=True)
        print("compiled:", *(step() for _ in range(STEPS)))


if __name__ == "__main__":
    main()
