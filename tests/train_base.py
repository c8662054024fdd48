"""The script that made the demo's base model: a small Stable Diffusion of coloured shapes.

    python tests/train_base.py FOLDER

First it trains the VAE, then, on its latents, text encoder and UNet together. Quality, duration and the checksums of
the weights go to quality.json beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from base_model import build_parts, write_parts, write_tokenizer
from diffusers import AutoencoderKL, StableDiffusionPipeline, UniPCMultistepScheduler
from torch import Tensor
from torch.nn.functional import mse_loss

from raycontrolnet.demo import shapes
from raycontrolnet.demo.evaluation import colours_are_right
from raycontrolnet.model.diffusion import add_noise, prediction_target, sample_posterior
from raycontrolnet.model.vae import encode_images

RESOLUTION = 64
KL_WEIGHT = 1e-3
"""Weight of the divergence per latent against the squared error per value: the posterior's deviation becomes about 3%
of the latents'."""
POOL_ROWS = 16384
"""Rows that the UNet is trained on: every pair of colours with every shape about 22 times."""
EMA_DECAY = 0.998
PROPORTION_EMPTY_PROMPTS = 0.1
LOG_EVERY = 100
MEASURED_SEED = 77
RECORD = "quality.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_steps", type=int, default=6000)
    parser.add_argument("--unet_steps", type=int, default=4000)
    parser.add_argument("--measure", action="store_true", help="only measure what is in the folder")
    args = parser.parse_args()
    if not args.measure:
        train(args.folder, args.seed, args.vae_steps, args.unet_steps)
    _record(args.folder, quality(args.folder))
    print((args.folder / RECORD).read_text())


def train(folder: Path, seed: int, vae_steps: int, unet_steps: int) -> None:
    """Train the whole base model and write it in half precision."""
    started = time.monotonic()
    tokenizer = write_tokenizer(folder / "tokenizer")
    vae_folder = folder / "vae-fp32"
    torch.manual_seed(seed)
    train_vae(build_parts("small", tokenizer)["vae"], vae_steps, seed).save_pretrained(vae_folder)
    print(f"VAE after {time.monotonic() - started:.0f} s", flush=True)
    torch.manual_seed(seed)
    parts = build_parts("small", tokenizer, "v_prediction") | {"vae": AutoencoderKL.from_pretrained(vae_folder)}
    parts["vae"].register_to_config(_name_or_path="")  # which would be the folder
    train_unet(parts, tokenizer, unet_steps, seed)
    for name in ("text_encoder", "vae", "unet"):
        parts[name].half()
    write_parts(folder, parts)
    shutil.rmtree(vae_folder)
    seconds = round(time.monotonic() - started)
    made = {"seed": seed, "vae_steps": vae_steps, "unet_steps": unet_steps, "seconds": seconds}
    _record(folder, made | {"machine": platform.machine(), "threads": torch.get_num_threads()})


def _record(folder: Path, values: dict[str, Any]) -> None:
    """Add `values` to the record of the base model."""
    file = folder / RECORD
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | values, indent=2) + "\n")


@torch.no_grad()
def quality(folder: Path, num_images: int = 200, guidance_scales: Sequence[float] = (1.0, 3.0, 7.5)) -> dict[str, Any]:
    """Measure how well the base model in `folder` reconstructs and draws; add the checksums of its weights."""
    rng = np.random.default_rng(MEASURED_SEED)
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    images = _images(rng, num_images)
    error = mse_loss(vae.decode(vae.encode(images).latent_dist.mean).sample, images)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    prompts = [shapes.draw_row(index, 1, MEASURED_SEED).text for index in range(num_images)]
    right = {}
    for guidance_scale in guidance_scales:
        generators = [torch.Generator().manual_seed(index) for index in range(num_images)]
        drawn = pipeline(prompts, num_inference_steps=20, guidance_scale=guidance_scale, generator=generators).images
        pairs = zip(drawn, prompts, strict=True)
        right[f"{guidance_scale:g}"] = float(np.mean([colours_are_right(np.asarray(one), text) for one, text in pairs]))
    files = sorted(folder.rglob("*.safetensors"))
    return {
        "reconstruction_psnr_db": round(_psnr(error), 2),
        "right_colours_by_guidance_scale": right,
        "images": num_images,
        "sha256": {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }


def train_vae(vae: Any, steps: int, seed: int, *, batch_size: int = 16, learning_rate: float = 2e-3) -> Any:
    """Train the VAE, and set its scaling factor so that latents have variance 1.

    The loss is the squared error of the reconstruction and a little of the posterior's divergence (Kingma & Welling
    2013, arXiv:1312.6114). Half of the images are in the named colours, half in any, so that the VAE can show others.
    """
    vae.train().to(memory_format=torch.channels_last)
    rng = np.random.default_rng((seed, 1))
    for step, update in _updates(vae.parameters(), steps, learning_rate):
        images = _images(rng, batch_size)
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        error = mse_loss(reconstruction, images)
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        update(error + KL_WEIGHT * divergence)
        if step % LOG_EVERY == 0:
            print(f"vae {step}: {_psnr(error):.1f} dB, divergence {divergence.item():.2f} a latent", flush=True)
    with torch.no_grad():
        vae.eval()
        images = _images(rng, 256)
        posterior = vae.encode(images).latent_dist
        vae.register_to_config(scaling_factor=float(1 / posterior.sample().std()))
        error = mse_loss(vae.decode(posterior.mean).sample, images)
    print(f"vae: {_psnr(error):.1f} dB, scaling factor {vae.config.scaling_factor:.4f}", flush=True)
    return vae


def _psnr(error: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB for a squared error of values in [-1, 1]."""
    return 10 * math.log10(4 / error.item())


def _images(rng: np.random.Generator, number: int) -> Tensor:
    """Draw images: fp32 [number, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack([_image(rng) for _ in range(number)])).permute(0, 3, 1, 2) / 127.5 - 1


def _image(rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.uint8]]:
    named = list(shapes.COLOURS.values())
    colours = rng.permutation(named)[:2] if rng.random() < 0.5 else rng.integers(256, size=(2, 3))
    corners = shapes.place(list(shapes.SHAPES)[rng.integers(3)], RESOLUTION, rng)
    colour, background = ((int(r), int(g), int(b)) for r, g, b in colours)
    return np.asarray(shapes.render(corners, RESOLUTION, colour, background))


def train_unet(
    parts: dict[str, Any], tokenizer: Any, steps: int, seed: int, *, batch_size: int = 64, learning_rate: float = 1e-3
) -> None:
    """Train text encoder and UNet on the VAE's latents, and keep the moving average of their weights."""
    vae, unet, text_encoder, scheduler = (parts[name] for name in ("vae", "unet", "text_encoder", "scheduler"))
    mean, logvar, input_ids = _pool(vae, tokenizer, seed)
    empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids[0]
    unet.train().to(memory_format=torch.channels_last)
    weights = [*unet.parameters(), *text_encoder.train().parameters()]
    average = [weight.detach().clone() for weight in weights]
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step, update in _updates(weights, steps, learning_rate):
        rows = torch.randint(len(mean), (batch_size,), generator=generator)
        posterior_noise, noise = torch.randn(2, *mean[rows].shape, generator=generator)
        latents = sample_posterior(mean[rows], logvar[rows], posterior_noise) * vae.config.scaling_factor
        dropped = torch.rand(batch_size, 1, generator=generator) < PROPORTION_EMPTY_PROMPTS
        hidden = text_encoder(torch.where(dropped, empty, input_ids[rows]), return_dict=False)[0]
        timesteps = torch.randint(1000, (batch_size,), generator=generator)
        alphas_cumprod = scheduler.alphas_cumprod[timesteps]
        prediction = unet(add_noise(latents, noise, alphas_cumprod), timesteps, hidden, return_dict=False)[0]
        loss = mse_loss(prediction, prediction_target("v_prediction", latents, noise, alphas_cumprod))
        update(loss)
        losses.append(loss.item())
        decay = min(EMA_DECAY, step / (step + 10))
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - decay)
        if step % LOG_EVERY == 0:
            print(f"unet {step}: loss {sum(losses[-LOG_EVERY:]) / LOG_EVERY:.4f}", flush=True)
    for weight, averaged in zip(weights, average, strict=True):
        weight.data = averaged


@torch.no_grad()
def _pool(vae: Any, tokenizer: Any, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Encode the rows to train on: mean and log-variance, fp32 [N, 4, h, w], and input_ids, int64 [N, 77]."""
    posteriors, texts = [], []
    for first in range(0, POOL_ROWS, 256):
        rows = [shapes.draw_row(index, RESOLUTION, seed + 1) for index in range(first, first + 256)]
        images = torch.from_numpy(np.stack([np.asarray(row.image) for row in rows]))
        posteriors.append(encode_images(vae, images))
        texts += [row.text for row in rows]
    input_ids = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    mean, logvar = (torch.cat(part) for part in zip(*posteriors, strict=True))
    return mean, logvar, input_ids


def _updates(weights: Iterable[torch.nn.Parameter], steps: int, learning_rate: float) -> Iterator[tuple[int, Any]]:
    """Yield steps from 1 on, each with a function that minimises a loss by AdamW, warmed up and annealed to 0."""
    weights = list(weights)
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05, cycle_momentum=False, final_div_factor=1e3
    )

    def update(loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()

    for step in range(1, steps + 1):
        yield step, update


if __name__ == "__main__":
    main()
