"""Drawing images with a ControlNet and the models in memory, which stay exactly as they were."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image

from raycontrolnet.model.prompts import warn_if_cut

if TYPE_CHECKING:
    from raycontrolnet.model.components import Components


@dataclass(frozen=True)
class Sampling:
    """How images are drawn, other than by the weights."""

    scheduler: ClassVar[str] = "UniPCMultistepScheduler"
    num_inference_steps: int = 20
    guidance_scale: float = 7.5


DEFAULT_SAMPLING = Sampling()


def build_pipeline(components: Components) -> Any:
    """The models in memory as a StableDiffusionControlNetPipeline with UniPC; loads and copies nothing.

    Args:
        components: the models themselves, not wrapped in DistributedDataParallel.
    """
    with _quiet():  # importing the pipelines makes transformers talk about torchvision
        from diffusers import StableDiffusionControlNetPipeline, UniPCMultistepScheduler

        pipeline = StableDiffusionControlNetPipeline(
            vae=components.vae,
            text_encoder=components.text_encoder,
            tokenizer=components.tokenizer,
            unet=components.unet,
            controlnet=components.controlnet,
            # the configuration says what the UNet predicts (epsilon or v), so both kinds of base work
            scheduler=UniPCMultistepScheduler.from_config(components.noise_scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: Any,
    prompts: Sequence[str],
    controls: Sequence[Image.Image],
    seeds: Sequence[int],
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> list[Image.Image]:
    """RGB images of the size of `controls`, each a function of its own arguments and the weights alone.

    They are drawn together: with others beside it, an image is the same but for rounding. The initial noise comes from
    a CPU generator of each image's own, so that it is the same on every device and torch's own random state is not
    touched. Modules keep their mode (training or evaluation) and their gradients.

    Args:
        pipeline: of `build_pipeline`.
        controls: RGB, of one size, width and height divisible by 8; one for every prompt, as of `seeds`.
        device: where the models are.
        autocast: fp16 or bf16 with mixed precision, None without.
    """
    modules = (pipeline.text_encoder, pipeline.vae, pipeline.unet, pipeline.controlnet)
    for prompt in prompts:
        warn_if_cut(pipeline.tokenizer, prompt)
    with ExitStack() as drawing:
        drawing.enter_context(_quiet())
        drawing.enter_context(evaluating(modules))
        drawing.enter_context(torch.no_grad())
        if autocast is not None:
            drawing.enter_context(torch.autocast(device.type, dtype=autocast))
        images: list[Image.Image] = pipeline(
            list(prompts),
            image=list(controls),
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
        return images


@contextmanager
def evaluating(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Evaluation mode; afterwards every submodule has the mode it had, also where they differed."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' and transformers' advice, which is for people who call them."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [library.level for library in loggers]
    try:
        for library in loggers:
            library.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # diffusers 0.42's UniPC hands numpy >= 2 a torch tensor, which does not know `copy=` yet
            warnings.filterwarnings("ignore", message="__array__ implementation", category=DeprecationWarning)
            yield
    finally:
        for library, level in zip(loggers, levels, strict=True):
            library.setLevel(level)
