"""Images to the VAE's posterior, in batches, for the latent cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from raycontrolnet.config.settings import ModelConfig
from raycontrolnet.data.records import UInt8Image
from raycontrolnet.model.diffusion import MAX_LOGVAR, MIN_LOGVAR
from raycontrolnet.model.performance import tf32
from raycontrolnet.model.vae import encode_images, load_vae


class LatentEncoder:
    """The VAE's encoder on a device.

    It runs in fp32, without TF32, whatever the precision of training: half precision overflows in some VAEs, and one
    cache serves all runs.
    """

    def __init__(self, model: ModelConfig, *, device: torch.device, batch_size: int, token: str | None = None):
        self.device, self.batch_size = device, batch_size
        self.vae = load_vae(model, dtype=torch.float32, token=token).requires_grad_(False).eval().to(device)
        del self.vae.decoder  # half of the memory

    def encode(self, images: Sequence[UInt8Image]) -> list[NDArray[np.float32]]:
        """Return mean and log-variance (clamped as by diffusers, not scaled), fp32 [2, C, h, w], of each [H, W, 3].

        Images of one size are encoded together.
        """
        by_size = defaultdict[tuple[int, ...], list[int]](list)
        for place, image in enumerate(images):
            by_size[image.shape].append(place)
        posteriors: dict[int, NDArray[np.float32]] = {}
        with torch.no_grad(), tf32(allowed=False):
            for places in by_size.values():
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    stacked = torch.from_numpy(np.stack([images[place] for place in batch])).to(self.device)
                    mean, logvar = encode_images(self.vae, stacked)
                    both = torch.stack([mean, logvar.clamp(MIN_LOGVAR, MAX_LOGVAR)], dim=1).cpu().numpy()
                    posteriors.update(zip(batch, both, strict=True))
        return [posteriors[place] for place in range(len(images))]
