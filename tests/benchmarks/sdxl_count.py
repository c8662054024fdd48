"""Work and memory of a training step of Stable Diffusion XL, counted: nothing is computed, no weights are needed.

    python tests/benchmarks/sdxl_count.py [--resolution 1024] [--batch_sizes 1 2 3 4]

The step is that of `raycontrolnet train`, on models of SDXL's published sizes whose tensors have shapes and types alone
(torch's FakeTensorMode): floating-point operations by torch's counter, memory as the most bytes that are alive at a
time. A GPU needs more: its context, the kernels' workspaces, and gaps between blocks, 1 to 3 GB together.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from raycontrolnet.model.components import Components
from raycontrolnet.model.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from raycontrolnet.model.step import Batch, Draws, controlnet_loss, with_posterior

TOKENS, SIZES = 77, 6
CHECKPOINTED = (True, False)
MOMENTS = {"AdamW": 8, "AdamW8bit": 2}
"""Bytes of the optimizer's state for each weight."""
ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value)
    ),
}
"""Fused attention, which torch counts on GPUs alone."""


def sdxl() -> Components:
    """Build SDXL in the sizes of stabilityai/stable-diffusion-xl-base-1.0, in bf16, with a ControlNet in fp32."""
    with half_precision():
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        texts = (
            CLIPTextModel(CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                projection_dim=768,
            )),
            CLIPTextModelWithProjection(CLIPTextConfig(
                hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                projection_dim=1280, hidden_act="gelu",
            )),
        )  # fmt: skip
    controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        scaling_factor=0.13025,
    )
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for module in (unet, vae, *texts):
        module.requires_grad_(False).eval()
    return Components(STABLE_DIFFUSION_XL, (), texts, vae, unet, scheduler, controlnet.train())


@contextmanager
def half_precision() -> Iterator[None]:
    """Make new weights bf16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def autocast_as_on_gpus(controlnet: torch.nn.Module) -> Callable[..., Any]:
    """Return the ControlNet as accelerate runs it on a GPU: in bf16, with normalizations in fp32."""
    for module in controlnet.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.forward = _in_fp32(module.forward)  # type: ignore[method-assign]

    def forward(*args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return controlnet(*args, **options)

    return forward


def _in_fp32(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(values: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(values.float())

    return run


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made in it, as long as something holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet[Any]()

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave out tensors that were there before."""
        for tensor in tensors:
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                size = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, size)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def batch_of(size: int, resolution: int) -> tuple[Batch, Draws]:
    """Return a batch from pixels with its draws."""
    image = torch.zeros(size, resolution, resolution, 3, dtype=torch.uint8)
    latents = torch.zeros(size, 4, resolution // 8, resolution // 8)
    tokens = torch.zeros(size, TOKENS, dtype=torch.int64)
    batch = Batch(image, image.clone(), (tokens, tokens.clone()), torch.zeros(size, SIZES))
    return batch, Draws(latents, latents.clone(), torch.zeros(size, dtype=torch.int64))


@dataclass(frozen=True)
class Counted:
    """A step from cached latents, or from pixels."""

    flop: int
    activations: int
    """Most bytes alive besides weights, gradients and moments."""


def count(size: int, resolution: int, *, checkpointed: bool, cached: bool) -> Counted:
    """Count a step of a batch."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        components = sdxl()
        if checkpointed:
            components.denoiser.enable_gradient_checkpointing()
            components.controlnet.enable_gradient_checkpointing()
        batch, draws = batch_of(size, resolution)
        if cached:
            batch = with_posterior(components, batch)
        parameters = list(components.controlnet.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)  # as left by the update before
        alive = AliveBytes()
        alive.ignore(tensor for module in (*components.frozen(), components.controlnet)
                     for tensor in (*module.parameters(), *module.buffers()))  # fmt: skip
        alive.ignore(parameter.grad for parameter in parameters if parameter.grad is not None)
        forward: Any = autocast_as_on_gpus(components.controlnet)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flop, alive:
            controlnet_loss(components, forward, batch, draws).mean().backward()
        return Counted(flop.get_total_flops(), alive.peak)


def sizes() -> dict[str, int]:
    """Return the number of weights of each part."""
    with FakeTensorMode():
        components = sdxl()
        one, two = components.text_encoders
        parts = {
            "UNet": components.denoiser, "ControlNet": components.controlnet, "VAE": components.vae,
            "text encoder": one, "text encoder 2": two,
        }  # fmt: skip
        return {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}


def fixed_bytes(weights: dict[str, int], optimizer: str) -> int:
    """Return the bytes that every step holds: the frozen parts but the VAE in bf16, the ControlNet, its gradients."""
    frozen = sum(number for name, number in weights.items() if name not in ("ControlNet", "VAE"))
    return 2 * frozen + weights["ControlNet"] * (4 + 4 + MOMENTS[optimizer])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=1024)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 2, 3, 4])
    args = parser.parse_args(arguments)
    weights = sizes()
    print("| Part | Weights |\n|---|---|")
    for name, number in weights.items():
        print(f"| {name} | {number / 1e6:,.0f} M |")
    from_cache, from_pixels = (
        count(1, args.resolution, checkpointed=False, cached=cached).flop for cached in (True, False)
    )
    print(f"\nAt {args.resolution} px an image takes {from_cache / 1e12:.2f} TFLOP from cached latents, "
          f"{from_pixels / 1e12:.2f} from pixels.\n")  # fmt: skip
    heads = [f"{optimizer}{', checkpointing' * checkpointed}" for checkpointed in CHECKPOINTED for optimizer in MOMENTS]
    print(f"| Batch | {' | '.join(heads)} |\n|---|{'---|' * len(heads)}")
    for size in args.batch_sizes:
        cells = []
        for checkpointed in CHECKPOINTED:
            activations = count(size, args.resolution, checkpointed=checkpointed, cached=True).activations
            cells += [f"{(fixed_bytes(weights, optimizer) + activations) / 1e9:.1f} GB" for optimizer in MOMENTS]
        print(f"| {size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
