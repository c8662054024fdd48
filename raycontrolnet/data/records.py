"""Records of the data path, from a row on disk to a batch in the worker, with dtype, shape and range.

from pixels:    ImageRow -> DecodedRow -> PreparedRow -> (bundles, through Ray Data) -> model.batch.Batch, on the device
from the cache: ImageRow -> EncodedRow, once, on disk -> StoredRow -> (bundles) -> PreparedRow -> model.batch.Batch
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raycontrolnet.data.remote_path import RemotePath

UInt8Image = NDArray[np.uint8]
EncodedImage = bytes | str | RemotePath
Posterior = NDArray[np.float16] | NDArray[np.float32]
Size = tuple[int, int]
"""(height, width), or a place in an image as (top, left), in pixels."""
SizeConditions = tuple[int, int, int, int, int, int]
"""Height and width of the image in its file, top and left of the crop, height and width after it."""


@dataclass(frozen=True)
class ImageRow:
    """One row of a source, not decoded."""

    image: EncodedImage
    """Encoded image file (png, jpeg, ...) as bytes, or the path of one."""
    conditioning_image: EncodedImage
    """The same for the conditioning image."""
    captions: tuple[str, ...]
    """At least one; one of them is drawn for every use."""
    place: str
    """File and line, or data set and row, for messages."""


@dataclass(frozen=True)
class EncodedRow:
    """One row of the latent cache."""

    row: int
    """Index in the source."""
    posterior: Posterior
    """[2, C, h, w]: mean and log-variance of the VAE's posterior for the image, not scaled."""
    conditioning_png: bytes
    """The conditioning image after the geometry, [height, width], as a PNG file: RGB, or L if it is grey."""
    captions: tuple[str, ...]
    identity: str
    """`Source.identities` of the row when it was encoded."""
    original_size: Size | None = None
    """Size of the image in its file, upright; None in caches of versions before it was stored."""
    place: str = ""
    """File that it was read from, for messages."""
    flipped_posterior: Posterior | None = None
    """The same as `posterior` for the mirrored image; None in caches without it."""
    crop: tuple[float, float] | None = None
    """Place of the row's random crop, (top, left) as in `View`; None in caches without random crops."""

    def posterior_seen(self, *, flipped: bool) -> Posterior:
        """Return the posterior of the image, or of its mirror image.

        Raises:
            ValueError: if the cache has none of mirror images.
        """
        if not flipped:
            return self.posterior
        if self.flipped_posterior is None:
            raise ValueError(f"{self.place}: has no latents of mirrored images")
        return self.flipped_posterior


@dataclass(frozen=True)
class DecodedRow:
    """One row with its images as arrays, before a prompt is drawn."""

    captions: tuple[str, ...]
    conditioning_image: UInt8Image
    """[height, width, 3] RGB."""
    image: UInt8Image
    """[height, width, 3] RGB."""
    original_size: Size
    """As in `EncodedRow`."""


@dataclass(frozen=True)
class StoredRow:
    """One sample of the latent cache on its way to a worker, which decodes it: a tenth of the bytes of its images."""

    sample_index: int
    """As in `PreparedRow`, like the other fields of the same names."""
    prompt: str
    posterior: Posterior
    conditioning_png: bytes
    """As in `EncodedRow`."""
    size_conditions: SizeConditions | None
    place: str
    """As in `EncodedRow`."""
    flipped: bool = False
    """True if the conditioning image is to be mirrored; the posterior is of the mirrored image already."""


@dataclass(frozen=True)
class PreparedRow:
    """One sample, ready to be stacked. Images are still uint8: a quarter of the bytes of float32."""

    sample_index: int
    """k: number of the sample in the run, from 0 over all epochs."""
    image: UInt8Image | None
    """[height, width, 3] RGB; None if the sample comes from the latent cache."""
    conditioning_image: UInt8Image
    """[height, width, 3] RGB."""
    prompt: str
    """The caption drawn for this use, or the empty prompt."""
    posterior: Posterior | None = None
    """As in `EncodedRow`; None if the sample comes from pixels."""
    size_conditions: SizeConditions | None = None
    """For base models that are conditioned on sizes; None if nobody asked for them."""

    @property
    def size(self) -> Size:
        """Height and width of its images."""
        height, width, _ = self.conditioning_image.shape
        return height, width
