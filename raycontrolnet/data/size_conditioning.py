"""The sizes that some base models are conditioned on (SDXL; Podell et al. 2023, arXiv:2307.01952, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

from raycontrolnet.data.augmentation import CENTRED, View
from raycontrolnet.data.records import Size, SizeConditions
from raycontrolnet.errors import DataError


@dataclass(frozen=True)
class SizeConditioning:
    """The rule by which samples get their size conditions."""

    resolution: int
    corner: tuple[int, int] = (0, 0)
    """(top, left) that every sample is said to be cropped at, unless `real`."""
    real: bool = False
    """True for each image's own size and crop; else every image is said to be of the resolution."""

    def conditions(self, original_size: Size | None, view: View = CENTRED) -> SizeConditions:
        """Return the size conditions of a sample whose image had this size, and is seen by `view`.

        Raises:
            DataError: if the size is needed, and not known.
        """
        target = (self.resolution, self.resolution)
        if not self.real:
            return *target, *self.corner, *target
        if original_size is None:
            raise DataError(
                "--size_conditioning=real: the latent cache was made by an earlier version, without the images' sizes; "
                "name another --latents_cache_dir"
            )
        return *original_size, *corner_in_view(original_size, self.resolution, view), *target


def resized_size(size: Size, resolution: int) -> Size:
    """Return the size after resizing the short side to `resolution`; the long side is cut off to whole pixels."""
    height, width = size
    long = int(resolution * max(size) / min(size))
    return (long, resolution) if width <= height else (resolution, long)


def crop_corner(size: Size, resolution: int, view: View = CENTRED) -> Size:
    """Return (top, left) of the crop of a resized image; half pixels are rounded to even numbers."""
    height, width = resized_size(size, resolution)
    return round((height - resolution) * view.top), round((width - resolution) * view.left)


def corner_in_view(size: Size, resolution: int, view: View) -> Size:
    """Return the crop's (top, left) in the image as it is seen: in its mirror image, if the view is flipped."""
    top, left = crop_corner(size, resolution, view)
    return top, resized_size(size, resolution)[1] - resolution - left if view.flipped else left
