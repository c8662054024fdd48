"""Evaluation of the demo's ControlNet: images for control images that it has never seen, measured and shown."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from raycontrolnet.config.generate_config import GenerateConfig
from raycontrolnet.data.records import UInt8Image
from raycontrolnet.demo.shapes import COLOURS, read_rows
from raycontrolnet.sampling.fidelity import found_shape
from raycontrolnet.sampling.generate import generate
from raycontrolnet.sampling.images import PairImages, fidelity_of
from raycontrolnet.sampling.scores import Fidelity
from raycontrolnet.training import held_out

BATCH_SIZE = 25
SHOWN = 8
"""Number of control images in the picture."""


class Evaluation(NamedTuple):
    """A ControlNet's images for unseen control images, and their scores."""

    pairs: Sequence[PairImages]
    fidelity: Fidelity
    """Intersection over union of the shape asked for and the shape drawn."""
    right_colours: float
    """Share of the images with both shape and background in the colours of the prompt."""

    @property
    def figures(self) -> dict[str, float]:
        """Figures for demo.json."""
        return {
            "control_fidelity": self.fidelity.mean,
            "control_fidelity_error": self.fidelity.error,
            "right_colours": self.right_colours,
            "images": len(self.pairs),
        }


def evaluate(
    controlnet: Path, base: Path, unseen: Path, out: Path, *,
    guidance_scale: float | None, use_gpu: bool | None = None, number: int | None = None,
) -> Evaluation:  # fmt: skip
    """Draw one image for every row of the data set `unseen`, and score them.

    Args:
        controlnet: folder of the ControlNet.
        base: folder of the base model.
        out: folder for the images.
        number: of rows, the first ones; None for all.
    """
    rows = read_rows(unseen)[:number]
    config = GenerateConfig(
        controlnet=str(controlnet),
        pretrained_model_name_or_path=str(base),
        prompt=tuple(text for _, text in rows),
        image=tuple(str(path) for path, _ in rows),
        num_images=1,
        batch_size=BATCH_SIZE,
        resolution=64,
        guidance_scale=guidance_scale,
        use_gpu=use_gpu,
        control_fidelity="shape",
        out=str(out),
    )
    pairs = generate(config, stream=StringIO())
    fidelity = fidelity_of(pairs)
    assert fidelity is not None, "scores were asked for"
    right = [colours_are_right(_read(pair.images[0]), pair.prompt) for pair in pairs]
    return Evaluation(pairs, fidelity, float(np.mean(right)))


def colours_are_right(image: UInt8Image, prompt: str) -> bool:
    """Check that the shape in an image has the first colour in `prompt`, and the background the second.

    The nearest named colour to the median of the pixels counts.

    Args:
        image: uint8 [H, W, 3], RGB.
        prompt: such as "red circle with blue background".
    """
    shape = found_shape(image)
    if not shape.any():
        return False
    wanted, _, _, background, _ = prompt.split()
    return _nearest(image[shape]) == wanted and _nearest(image[~shape]) == background


def _nearest(pixels: npt.NDArray[np.uint8]) -> str:
    colour = np.median(pixels, axis=0)
    return min(COLOURS, key=lambda name: float(np.square(colour - COLOURS[name]).sum()))


def draw_picture(path: Path, before: Evaluation, after: Evaluation, run: Path) -> None:
    """Save a PNG of some control images, their images before and after training, and the control gap's curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(SHOWN, 3.2))
    left, right = parts
    rows = (
        ("asked for", [pair.control for pair in before.pairs]),
        (f"before\n{before.fidelity.mean:.2f}", [pair.images[0] for pair in before.pairs]),
        (f"after\n{after.fidelity.mean:.2f}", [pair.images[0] for pair in after.pairs]),
    )
    axes = left.subplots(len(rows), SHOWN)
    for line, (title, images) in zip(axes, rows, strict=True):
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for place, image in zip(line, images, strict=False):
            place.imshow(_read(image))
            place.set(xticks=[], yticks=[])
    curve = right.subplots()
    measured = held_out.read(run)
    curve.plot([one["step"] for one in measured], [one["control_gap"] for one in measured], "o-", markersize=3)
    curve.axhline(0, color="gray", linewidth=0.5)
    appeared = held_out.control_appeared(measured)
    if appeared is not None:
        curve.axvline(appeared, color="tab:green", linestyle="--")
        curve.annotate(" control appears", (appeared, 0.95), xycoords=("data", "axes fraction"), color="tab:green")
    curve.set(xlabel="updates", title="control gap on held-out rows")
    figure.savefig(path, dpi=110)


def _read(path: Path) -> UInt8Image:
    return np.asarray(Image.open(path).convert("RGB"))
