"""Drawing images with a ControlNet and the models in memory, which stay exactly as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from raycontrolnet.data.buckets import nearest_size
from raycontrolnet.data.records import Size
from raycontrolnet.model.prompts import warn_if_cut
from raycontrolnet.quiet import only_errors

if TYPE_CHECKING:
    from raycontrolnet.model.components import Components


class DrawingStopped(Exception):
    """The drawing was ended before the last step of an image, as `draw` was asked to."""


@dataclass(frozen=True)
class DrawOptions:
    """Everything but its prompt, control image and seed, and the weights, that an image depends on."""

    resolution: int
    """Width and height of the images in pixels."""
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    precision: torch.dtype = torch.float32
    """Dtype of the frozen models; float16 and bfloat16 are drawn with autocast."""
    batch_size: int = 1
    """Images drawn at a time. It changes them by rounding only."""
    measure: str | None = None
    """Measure of `control_fidelity`; None for no scores."""
    interpolation: str = "bilinear"
    """Resizing of control images."""
    sampler: str = "UniPCMultistepScheduler"
    """Class of diffusers that takes the steps."""
    bucket_sizes: tuple[Size, ...] = ()
    """Sizes of which each control image gets the nearest to its shape; none for the resolution squared."""

    def size_for(self, image: Image.Image) -> Size:
        """Return the height and width that a control image is brought to."""
        square = (self.resolution, self.resolution)
        return nearest_size((image.height, image.width), self.bucket_sizes) if self.bucket_sizes else square


def build_pipeline(components: Components) -> Any:
    """Build the family's ControlNet pipeline and sampler on the models in memory; load and copy nothing.

    Args:
        components: the models themselves, not wrapped in DistributedDataParallel.
    """
    with only_errors():  # importing the pipelines makes transformers log about torchvision
        pipeline = components.family.build_pipeline(components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: Any,
    components: Components,
    prompts: Sequence[str],
    controls: Sequence[Image.Image],
    seeds: Sequence[int],
    options: DrawOptions,
    ends_early: Callable[[], bool] | None = None,
) -> list[Image.Image]:
    """Draw RGB images of the size of `controls`, each a function of its own arguments and the weights alone.

    They are drawn in one batch, whose size changes an image by rounding only. The initial noise of each image comes
    from its own CPU generator, so it is the same on every device and torch's random state is not touched. Modules keep
    their mode (training or evaluation) and their gradients.

    Args:
        pipeline: of `build_pipeline`, for `components`.
        controls: RGB, of one size, width and height divisible by 8; as many as prompts and seeds.
        options: what decides the size of `controls`, `batch_size`, `measure` and `sampler` are not used here.
        ends_early: asked after every step of the sampler.

    Raises:
        DrawingStopped: if `ends_early` answers True.
    """

    def look(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert ends_early
        if ends_early():
            raise DrawingStopped
        return tensors

    modules = (*components.frozen(), components.controlnet)
    for prompt in prompts:
        warn_if_cut(components.tokenizers, prompt)
    is_mixed = options.precision != torch.float32
    autocast = torch.autocast(components.denoiser.device.type, dtype=options.precision) if is_mixed else nullcontext()
    decodes_apart = is_mixed and (components.vae.dtype == torch.float32 or _overflows(components))
    with only_errors(), evaluating(modules), torch.no_grad():
        with autocast:
            images: Any = pipeline(
                list(prompts),
                **{components.family.control_argument: list(controls)},
                width=controls[0].width,
                height=controls[0].height,
                num_inference_steps=options.num_inference_steps,
                guidance_scale=options.guidance_scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent" if decodes_apart else "pil",
                callback_on_step_end=look if ends_early else None,
            ).images
        return _decoded(pipeline, components, images) if decodes_apart else list(images)


def _decoded(pipeline: Any, components: Components, latents: torch.Tensor) -> list[Image.Image]:
    """Return the images of `latents`, decoded in fp32: autocast would run the VAE in half precision."""
    vae, dtype = components.vae, components.vae.dtype
    vae.to(torch.float32)
    try:
        pixels = vae.decode(components.family.unscale_latents(vae, latents.float()), return_dict=False)[0]
    finally:
        vae.to(dtype)
    return list(pipeline.image_processor.postprocess(pixels, output_type="pil"))


def _overflows(components: Components) -> bool:
    """Check for a VAE in fp16 that diffusers' pipeline of the family would decode with in fp32."""
    vae, family = components.vae, components.family
    family_upcasts = family.vae_dtype(vae.dtype, named=False) == torch.float32
    return vae.dtype == torch.float16 and family_upcasts and bool(vae.config.get("force_upcast"))


@contextmanager
def evaluating(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Put `modules` into evaluation mode, and afterwards give every submodule the mode that it had."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode
