r"""The reference for speed: a bare PyTorch and Accelerate loop that trains a ControlNet.

It does the work of the common training scripts and nothing else: PIL transforms in a DataLoader, the VAE and the text
encoder in every step, AdamW, gradient clipping; no checkpoints, validation or trackers. It prints one line of JSON.

    python tests/benchmarks/reference_loop.py --base DIR --data DIR --resolution 256 --batch_size 4 --steps 12 \
        --threads 2
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, CLIPTokenizer

WARM_UP_UPDATES = 3
"""The first updates allocate memory and choose kernels; images/s leaves them out."""


class ImageFolder(Dataset[dict[str, Tensor]]):
    """The rows of `metadata.jsonl` as tensors."""

    def __init__(self, folder: Path, resolution: int, tokenizer: Any):
        self.folder, self.resolution, self.tokenizer = folder, resolution, tokenizer
        with (folder / "metadata.jsonl").open(encoding="utf-8") as lines:
            self.rows = [json.loads(line) for line in lines]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        ids = self.tokenizer(row["text"], padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {
            "pixel_values": self.pixels(row["image"]) * 2 - 1,
            "conditioning_pixel_values": self.pixels(row["conditioning_image"]),
            "input_ids": ids[0],
        }

    def pixels(self, name: str) -> Tensor:
        """Return [3, resolution, resolution] in [0, 1]: the short side resized, the centre cropped."""
        with Image.open(self.folder / name) as file:
            image = file.convert("RGB")
        scale = self.resolution / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.resolution) // 2, (height - self.resolution) // 2
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() / 255


def images_per_second(update_times: list[float], batch_size: int) -> float:
    """Return images/s after the warm-up; `update_times`: seconds at which each update ended, from any zero."""
    measured = update_times[WARM_UP_UPDATES - 1 :]
    return batch_size * (len(measured) - 1) / (measured[-1] - measured[0])


def train(args: argparse.Namespace) -> list[float]:
    """Train, and return the unix seconds at which each update ended."""
    accelerator = Accelerator(mixed_precision="no")
    set_seed(args.seed)

    tokenizer = CLIPTokenizer.from_pretrained(args.base, subfolder="tokenizer")
    noise_scheduler = DDPMScheduler.from_pretrained(args.base, subfolder="scheduler")
    text_encoder = CLIPTextModel.from_pretrained(args.base, subfolder="text_encoder").to(accelerator.device)
    vae = AutoencoderKL.from_pretrained(args.base, subfolder="vae").to(accelerator.device)
    unet = UNet2DConditionModel.from_pretrained(args.base, subfolder="unet").to(accelerator.device)
    controlnet = (
        ControlNetModel.from_pretrained(args.controlnet) if args.controlnet else ControlNetModel.from_unet(unet)
    )
    for frozen in (text_encoder, vae, unet):
        frozen.requires_grad_(False)
    controlnet.train()

    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=5e-6, weight_decay=1e-2)
    loader = DataLoader(
        ImageFolder(args.data, args.resolution, tokenizer),
        batch_size=args.batch_size,
        shuffle=True,
        num_workers=args.num_workers,
    )
    controlnet, optimizer, loader = accelerator.prepare(controlnet, optimizer, loader)

    update_times = []
    batches = (batch for _ in itertools.count() for batch in loader)
    for batch in itertools.islice(batches, args.steps):
        with torch.no_grad():
            latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
            encoder_hidden_states = text_encoder(batch["input_ids"], return_dict=False)[0]
        noise = torch.randn_like(latents)
        steps = noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(latents),), device=latents.device)
        noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
        down, middle = controlnet(
            noisy_latents,
            timesteps,
            encoder_hidden_states=encoder_hidden_states,
            controlnet_cond=batch["conditioning_pixel_values"],
            return_dict=False,
        )
        prediction = unet(
            noisy_latents,
            timesteps,
            encoder_hidden_states=encoder_hidden_states,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        velocity = noise_scheduler.config.prediction_type == "v_prediction"
        target = noise_scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        loss = torch.nn.functional.mse_loss(prediction.float(), target.float())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(controlnet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # as a script that logs every step does; on a GPU it waits for the update
        update_times.append(time.time())
    return update_times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of a Stable Diffusion")
    parser.add_argument("--controlnet", type=Path, help="ControlNet to start from; by default a copy of the UNet")
    parser.add_argument("--data", type=Path, required=True, help="folder with metadata.jsonl")
    parser.add_argument("--resolution", type=int, default=256, help="pixels")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12, help=f"updates; more than {WARM_UP_UPDATES}")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads")
    parser.add_argument("--num_workers", type=int, default=0, help="the DataLoader's processes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.steps <= WARM_UP_UPDATES:
        parser.error(f"--steps={args.steps}: must be more than {WARM_UP_UPDATES}")
    torch.set_num_threads(args.threads)

    update_times = train(args)
    result = {
        "first_update_s": update_times[0] - psutil.Process().create_time(),
        "update_s": [end - start for start, end in itertools.pairwise(update_times)],
        "images_per_second": images_per_second(update_times, args.batch_size),
        "update_times": update_times,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
