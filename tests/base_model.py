"""A small Stable Diffusion in diffusers' layout: random weights for tests and benchmarks, or to be trained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from raycontrolnet.demo.shapes import COLOURS, SHAPES

Size = Literal["tiny", "small", "quarter"]
PredictionType = Literal["epsilon", "v_prediction"]

CONTEXT_LENGTH = 77
"""Tokens per prompt, as every Stable Diffusion 1.x and 2.x has."""

START, END = "<|startoftext|>", "<|endoftext|>"

SCALING_FACTOR = 0.18215
"""Latents x this have about unit variance, as in Stable Diffusion."""


@dataclass(frozen=True)
class _Size:
    """The sizes of one base model. The VAE has four levels, that is a factor of 8 between pixels and latents."""

    resolution: int
    """Pixels of the images that the model is for."""
    unet_channels: tuple[int, ...]
    unet_heads: int | tuple[int, ...]
    """Attention heads, of each level if several are given."""
    unet_groups: int
    """Groups of the group norm; Stable Diffusion's 32 do not divide a quarter of its channels."""
    layers_per_block: int
    vae_channels: tuple[int, int, int, int]
    vae_layers_per_block: int
    vae_groups: int
    text_width: int
    text_layers: int
    text_heads: int
    conditioning_embedding_channels: tuple[int, int, int, int]


_SIZES: dict[Size, _Size] = {
    # For tests: the fastest with two resolutions, cross attention and a middle block.
    "tiny": _Size(32, (8, 16), 2, 4, 1, (4, 4, 8, 8), 1, 4, 16, 1, 2, (4, 4, 8, 8)),
    # The demo's: learns shapes on a CPU.
    "small": _Size(64, (64, 128), 4, 8, 1, (8, 16, 32, 64), 1, 1, 64, 2, 4, (8, 16, 48, 128)),
    # For benchmarks: a quarter of SD 1.5's channels, and so its proportions of work; heads of 40 columns.
    "quarter": _Size(
        256, (80, 160, 320, 320), (2, 4, 8, 8), 16, 2, (32, 64, 128, 128), 2, 32, 192, 12, 3, (4, 8, 24, 64)
    ),
}

TINY = _SIZES["tiny"]
CONDITIONING_EMBEDDING_CHANNELS: dict[Size, tuple[int, int, int, int]] = {
    size: shape.conditioning_embedding_channels for size, shape in _SIZES.items()
}
"""`conditioning_embedding_out_channels` of a ControlNet in proportion to the base; diffusers' default fits SD 1.5."""


def write_random_base(
    folder: Path,
    size: Size = "small",
    *,
    prediction_type: PredictionType = "epsilon",
    seed: int = 0,
) -> Path:
    """Write a Stable Diffusion of `size` with random weights (fp32 safetensors) to `folder`, and return `folder`.

    The same seed gives the same weights; torch's random state is not changed. `model_index.json` is written last, so a
    folder that has it is complete.
    """
    folder = Path(folder)
    tokenizer = write_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
        parts = build_parts(size, tokenizer, prediction_type)
    return write_parts(folder, parts)


def write_random_xl_base(folder: Path, *, prediction_type: PredictionType = "epsilon", seed: int = 0) -> Path:
    """Write a tiny Stable Diffusion XL with random weights to `folder`, as `write_random_base`."""
    folder = Path(folder)
    tokenizers = [write_tokenizer(folder / name, pad) for name, pad in (("tokenizer", END), ("tokenizer_2", "!"))]
    shape = _SIZES["tiny"]
    second = replace(shape, text_width=24)
    sizes_width = 8  # of each of the six
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        vae = build_vae(shape)
        vae.register_to_config(force_upcast=True)
        parts = {
            "text_encoder": build_text_encoder(shape, tokenizers[0], layers=2),
            "text_encoder_2": build_text_encoder(second, tokenizers[1], layers=2, cls=CLIPTextModelWithProjection),
            "vae": vae,
            # Like SDXL: no attention at the highest resolution, more layers of it at lower ones, linear projections.
            "unet": UNet2DConditionModel(
                sample_size=shape.resolution // 8,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                block_out_channels=shape.unet_channels,
                layers_per_block=1,
                transformer_layers_per_block=(1, 2),
                norm_num_groups=shape.unet_groups,
                cross_attention_dim=shape.text_width + second.text_width,
                attention_head_dim=(2, 4),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=sizes_width,
                projection_class_embeddings_input_dim=second.text_width + 6 * sizes_width,
            ),
            "scheduler": EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
                steps_offset=1, timestep_spacing="leading",
            ),
        }  # fmt: skip
        parts["scheduler"].register_to_config(clip_sample=False)
    return write_parts(folder, parts, "StableDiffusionXLPipeline")


def build_parts(size: Size, tokenizer: CLIPTokenizer, prediction_type: PredictionType = "epsilon") -> dict[str, Any]:
    """Build text_encoder, vae, unet and scheduler, with weights drawn from torch's random state."""
    shape = _SIZES[size]
    return {
        "text_encoder": build_text_encoder(shape, tokenizer),
        "vae": build_vae(shape),
        "unet": _unet(shape),
        "scheduler": _scheduler(prediction_type),
    }


def write_parts(folder: Path, parts: Mapping[str, Any], pipeline: str = "StableDiffusionPipeline") -> Path:
    """Write the parts of `build_parts` to `folder`, which holds the tokenizers, and return `folder`."""
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    # Not by StableDiffusionPipeline, which takes seconds to import.
    index = {
        "_class_name": pipeline,
        "_diffusers_version": diffusers.__version__,
        **({} if "text_encoder_2" in parts else {"requires_safety_checker": False, "safety_checker": (None, None)}),
        **dict.fromkeys(("feature_extractor", "image_encoder"), (None, None)),
        **{path.name: ("transformers", "CLIPTokenizer") for path in sorted(folder.glob("tokenizer*"))},
        **{name: (type(part).__module__.partition(".")[0], type(part).__name__) for name, part in parts.items()},
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def _unet(shape: _Size) -> UNet2DConditionModel:
    # Like SD 1.5: attention at every resolution but the last.
    attention_levels = len(shape.unet_channels) - 1
    return UNet2DConditionModel(
        sample_size=shape.resolution // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * attention_levels + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attention_levels,
        block_out_channels=shape.unet_channels,
        layers_per_block=shape.layers_per_block,
        norm_num_groups=shape.unet_groups,
        cross_attention_dim=shape.text_width,
        attention_head_dim=shape.unet_heads,  # diffusers' name for the number of heads
    )


def build_vae(shape: _Size, latent_channels: int = 4) -> AutoencoderKL:
    """Build a VAE with weights drawn from torch's random state."""
    vae = AutoencoderKL(
        sample_size=shape.resolution,
        in_channels=3,
        out_channels=3,
        latent_channels=latent_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=shape.vae_channels,
        layers_per_block=shape.vae_layers_per_block,
        norm_num_groups=shape.vae_groups,
        scaling_factor=SCALING_FACTOR,
    )
    _normalize_latents(vae)
    return vae


@torch.no_grad()
def _normalize_latents(vae: AutoencoderKL) -> None:
    """Scale the encoder's last layer so that latents x scaling factor have mean 0 and variance 1, as a trained VAE's.

    The log variance of the posterior is near 0, so that sampling from it is visible and does not drown the image.
    """
    patches = torch.rand(8, 3, 8, 8) * 2 - 1  # patches of plain colour and their edges
    images = torch.nn.functional.interpolate(patches, size=(64, 64), mode="nearest")
    moments = torch.cat([vae.encode(image[None]).latent_dist.parameters for image in images])  # [8, 2 * C, 8, 8]
    std, mean = torch.std_mean(moments, dim=(0, 2, 3))
    half = len(std) // 2
    wanted_std = torch.tensor([1 / SCALING_FACTOR] * half + [0.5] * half)
    scale = wanted_std / std
    layer = vae.quant_conv
    assert layer is not None
    assert layer.bias is not None
    layer.weight.mul_(scale[:, None, None, None])
    layer.bias.sub_(mean).mul_(scale)


def build_text_encoder(
    shape: _Size, tokenizer: CLIPTokenizer, layers: int | None = None, cls: type[Any] = CLIPTextModel
) -> Any:
    """Build a text encoder with weights drawn from torch's random state."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.text_width,
        intermediate_size=4 * shape.text_width,
        projection_dim=shape.text_width,
        num_hidden_layers=layers or shape.text_layers,
        num_attention_heads=shape.text_heads,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cls(config).eval()


def _scheduler(prediction_type: str) -> PNDMScheduler | DDIMScheduler:
    """Build the scheduler of SD 1.5 (epsilon) or SD 2.1 (v_prediction)."""
    settings = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "prediction_type": prediction_type,
    }
    if prediction_type == "v_prediction":
        return DDIMScheduler(**settings, clip_sample=False)
    # PNDM does not clip; DDPM and DDIM, which read this config, would without this entry.
    scheduler = PNDMScheduler(**settings, skip_prk_steps=True)
    scheduler.register_to_config(clip_sample=False)
    return scheduler


def write_tokenizer(folder: Path, pad: str = END) -> CLIPTokenizer:
    """Write CLIP's byte-level BPE with a small vocabulary, and return it loaded.

    Any text can be encoded; each word of the shapes' captions is one token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    merges = _learn_merges((*COLOURS, *SHAPES, "with", "background"))
    letters = list(_byte_letters())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
    files = {
        "vocab.json": json.dumps({token: index for index, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, merges), ""]),
        "tokenizer_config.json": json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": CONTEXT_LENGTH,
                "do_lower_case": True,
                "bos_token": START,
                "eos_token": END,
                "pad_token": pad,
                "unk_token": END,
            }
        ),
    }
    for name, content in files.items():
        (folder / name).write_text(content, encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def _byte_letters() -> Iterable[str]:
    """Return one printable letter for each of the 256 bytes, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return map(chr, [*printable, *range(256, 256 + others)])


def _learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Learn byte pair encoding: merge the commonest pair of neighbours until each of `words` is one token."""
    splits = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for split in splits for pair in pairwise(split)):
        pair = min(pairs, key=lambda candidate: (-pairs[candidate], candidate))
        merges.append(pair)
        for split in splits:
            for place in range(len(split) - 2, -1, -1):
                if tuple(split[place : place + 2]) == pair:
                    split[place : place + 2] = ["".join(pair)]
    return merges
