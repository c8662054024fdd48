"""The sizes that some base models are conditioned on (SDXL; Podell et al. 2023, arXiv:2307.01952, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

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

    def conditions(self, original_size: Size | None, size: Size | None = None) -> SizeConditions:
        """Return the size conditions of a sample whose image had this size.

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
        return *original_size, *crop_corner(original_size, target), *target


def resized_size(size: Size, target: Size) -> Size:
    """Return the smallest size of the same shape that covers `target`, the longer side cut off to whole pixels.

    A square target is covered if the short side has its length.
    """
    (height, width), (target_height, target_width) = size, target
    if target_width * height >= target_height * width:
        return target_width * height // width, target_width
    return target_height, target_height * width // height


def crop_corner(size: Size, target: Size) -> Size:
    """Return (top, left) of the centre crop of a resized image; half pixels are rounded to even numbers."""
    top, left = (round((side - own) / 2) for side, own in zip(resized_size(size, target), target, strict=True))
    return top, left
