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
    """True for each image's own size and crop; else every image is said to be of its sample's size."""

    def conditions(self, original_size: Size | None, view: View = CENTRED, size: Size | None = None) -> SizeConditions:
        """Return the size conditions of a sample whose image had this size, and is seen by `view`.

        Args:
            size: of the sample, if it is not the resolution squared.

        Raises:
            DataError: if the image's size is needed, and not known.
        """
        target = size or (self.resolution, self.resolution)
        if not self.real:
            return *target, *self.corner, *target
        if original_size is None:
            raise DataError(
                "--size_conditioning=real: the latent cache was made by an earlier version, without the images' sizes; "
                "name another --latents_cache_dir"
            )
        return *original_size, *corner_in_view(original_size, target, view), *target


def resized_size(size: Size, target: Size) -> Size:
    """Return the smallest size of the same shape that covers `target`, the longer side cut off to whole pixels.

    A square target is covered if the short side has its length.
    """
    (height, width), (target_height, target_width) = size, target
    if target_width * height >= target_height * width:
        return target_width * height // width, target_width
    return target_height, target_height * width // height


def crop_corner(size: Size, target: Size, view: View = CENTRED) -> Size:
    """Return (top, left) of the crop of a resized image; half pixels are rounded to even numbers."""
    (height, width), (target_height, target_width) = resized_size(size, target), target
    return round((height - target_height) * view.top), round((width - target_width) * view.left)


def corner_in_view(size: Size, target: Size, view: View) -> Size:
    """Return the crop's (top, left) in the image as it is seen: in its mirror image, if the view is flipped."""
    top, left = crop_corner(size, target, view)
    return top, resized_size(size, target)[1] - target[1] - left if view.flipped else left
