"""Every setting, declared once, in the group of the part of the program that needs it.

A function that needs only the optimizer's settings takes an `OptimConfig`. `TrainConfig` has all groups under flat
names, so that the command line (`--learning_rate 1e-5`), YAML (`learning_rate: 1e-5`), Python
(`TrainConfig(learning_rate=1e-5)`), a sweep's space and a checkpoint's manifest use one name for a setting.

To add a setting, add a field to the group of its owner: its default, the facts about it (`Facts` in declare.py lists
them), and its help text below. If some values cannot be run, add a line to the group's `problems`. This module imports
neither torch nor ray: `--help` and bad flags answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from raycontrolnet.config.data_sources import source_problems
from raycontrolnet.config.declare import setting
from raycontrolnet.config.rules import (
    NO_VALUE,
    Problems,
    at_least,
    in_unit_interval,
    one_of,
    problem_of,
    resolution_problems,
    secret_problems,
    seed_problems,
)

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
MIXED_PRECISIONS = ("no", "fp16", "bf16")
CACHE_MODES = ("auto", "on", "off")
GRAPH_MODES = ("auto", "on", "off")
LATENTS_DTYPES = ("float16", "float32")
BAD_SAMPLES = ("fail", "skip")
CROPS = ("center", "top", "random")
INTERPOLATION_MODES = ("nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
SIZE_CONDITIONINGS = ("fixed", "real")
BASE_FOLDERS = ("vae", "text_encoder", "scheduler")
"""Folders of a base model in diffusers' layout, besides that of its denoiser."""

# Reasons why all trials of a sweep share a value
FILES = "decides where files are kept or how latents are made, which all trials share"
FAULTS = "decides what a fault ends, not what is learned"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model: the base model, and the ControlNet to start from."""

    pretrained_model_name_or_path: str = setting(
        "", sweepable=True, decides="latents", path="or id", model_folders=BASE_FOLDERS
    )
    """Base model, Stable Diffusion 1.x and 2.x or Stable Diffusion XL: folder, Hub id, .safetensors file. Required."""
    pretrained_vae_model_name_or_path: str | None = setting(
        None, sweepable=True, decides="latents", path="or id", model_folders=()
    )
    """VAE instead of the base model's own: a local folder or a Hub id. It runs in the precision of training."""
    base_config: str | None = setting(None, sweepable=True, decides="latents", path="or id", model_folders=())
    """Model in diffusers' layout that configures a single-file base: a folder or a Hub id; by default the original."""
    controlnet_model_name_or_path: str | None = setting(None, sweepable=True, path="or id", model_folders=())
    """ControlNet to start from; without it, its weights are copied from the base model's UNet."""
    revision: str | None = setting(None, sweepable=True, decides="latents")
    """Revision (branch, tag or commit) of the base model on the Hub."""
    variant: str | None = setting(None, sweepable=True, decides="latents")
    """File variant of the base model, such as fp16."""
    tokenizer_name: str | None = setting(None, sweepable=True, path="or id", model_folders=())
    """Tokenizer, if not the base model's (first) one: a local folder or a Hub id."""
    cache_dir: str | None = setting(None, fixed=FILES, in_prepare=True, path="local", left_out_of_card=True)
    """Folder for downloaded models and data sets."""

    def problems(self) -> Problems:
        if not self.pretrained_model_name_or_path:
            yield "--pretrained_model_name_or_path: required; a local folder or a Hub id of a Stable Diffusion model"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data: the data set, and what is taken from it."""

    dataset_name: str | tuple[str, ...] | None = setting(None, sweepable=True, decides="latents", path="or id")
    """Hub ids of data sets, or paths or URIs (s3://, gs://, ...) of such as datasets.load_dataset reads."""
    dataset_config_name: str | tuple[str, ...] | None = setting(None, sweepable=True, decides="latents")
    """Name of the data set's configuration, if it has several; or one for each data set."""
    train_data_dir: str | tuple[str, ...] | None = setting(None, sweepable=True, decides="latents", path="or URI")
    """Folders, by path or URI (s3://, gs://, ...), with images and metadata.jsonl, or of WebDataset tars."""
    data_weights: tuple[float, ...] | None = setting(None, fixed="is a list of numbers, which a space cannot hold")
    """Shares of the samples that are of each source, in any unit (2 1); by default each row is as likely."""
    image_column: str | tuple[str, ...] = setting("image", sweepable=True, decides="latents")
    """Column of the target images; in tars, their extension. Or one for each source, as of the next two."""
    conditioning_image_column: str | tuple[str, ...] = setting("conditioning_image", sweepable=True, decides="latents")
    """Column of the conditioning images; in tars, their extension, such as control or control.png."""
    caption_column: str | tuple[str, ...] = setting("text", sweepable=True, decides="latents")
    """Column of the captions: a string, or a list of strings, one drawn for every use; in tars, their extension."""
    max_train_samples: int | None = setting(
        None, decides_measurement="which rows there are to train on and to hold out", in_prepare=True
    )
    """Train on a seeded random subset of this many rows, the same on every worker."""
    proportion_empty_prompts: float = setting(0.0, sweepable=True)
    """Share of prompts replaced by the empty one, in [0, 1]."""
    resolution: int = setting(512, sweepable=True, decides="latents")
    """Images are resized (short side) and cropped to this many pixels; divisible by 8."""
    aspect_buckets: bool = setting(False, sweepable=True, decides="latents")
    """Bring each image to a size near its own shape, of about resolution x resolution pixels, instead of a square."""
    crop: str = setting("center", sweepable=True, decides="latents")
    """Place of the crop of both images: center (also as --center_crop), top, or random (also as --random_crop): drawn
    for every use; cached, once."""
    random_flip: bool = setting(False, sweepable=True, decides="latents")
    """Mirror both images of half of the samples, left to right; cached latents are stored both ways."""
    image_interpolation_mode: str | None = setting(None, sweepable=True, decides="latents")
    """nearest, nearest_exact, bilinear, bicubic, box, hamming or lanczos; by default bilinear, for SDXL lanczos."""
    size_conditioning: str = setting("fixed", sweepable=True)
    """Sizes that SDXL is told: fixed (the resolution, and the corner below) or real (each image's size and crop)."""
    crops_coords_top_left_h: int = setting(0, sweepable=True)
    """Top of the crop that SDXL is told with --size_conditioning fixed."""
    crops_coords_top_left_w: int = setting(0, sweepable=True)
    """Left of the crop that SDXL is told with --size_conditioning fixed."""

    def problems(self) -> Problems:
        yield from source_problems(self)
        yield from secret_problems(self, "train_data_dir", "dataset_name")
        yield from in_unit_interval(self, "proportion_empty_prompts")
        yield from resolution_problems(self)
        yield from one_of(self, "crop", CROPS)
        yield from one_of(self, "image_interpolation_mode", INTERPOLATION_MODES)
        yield from one_of(self, "size_conditioning", SIZE_CONDITIONINGS)
        yield from at_least(self, 0, "crops_coords_top_left_h", "crops_coords_top_left_w")
        yield from at_least(self, 1, "max_train_samples")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Latents: the cache of encoded images."""

    cache_latents: str = setting("auto", fixed=FILES)
    """Encode every image once and train from the stored latents: on, off, or auto (above 1.1 uses of an image)."""
    latents_cache_dir: str | None = setting(None, fixed=FILES, in_prepare=True, path="or URI")
    """Folder or object-store URI of the cached latents; by default one in ~/.cache/raycontrolnet/latents."""
    latents_dtype: str = setting("float16", sweepable=True, decides="latents")
    """float16 or float32: precision of the stored latents."""
    latents_batch_size: int = setting(4, fixed=FILES, in_prepare=True)
    """Images that the VAE encodes at a time."""
    on_bad_sample: str = setting("fail", fixed=FILES, in_prepare=True)
    """Reaction to images that cannot be used: fail (with the list, at the end), or skip them."""
    max_bad_fraction: float = setting(0.01, fixed=FILES, in_prepare=True)
    """Largest share of samples that may be skipped, in [0, 1]."""

    def problems(self) -> Problems:
        yield from one_of(self, "cache_latents", CACHE_MODES)
        yield from one_of(self, "latents_dtype", LATENTS_DTYPES)
        yield from one_of(self, "on_bad_sample", BAD_SAMPLES)
        yield from at_least(self, 1, "latents_batch_size")
        yield from in_unit_interval(self, "max_bad_fraction")
        if self.latents_cache_dir == "":
            yield f"--latents_cache_dir: {NO_VALUE}; name a folder, or leave it out for the default one"
        yield from secret_problems(self, "latents_cache_dir")
        if self.cache_latents == "off" and self.on_bad_sample == "skip":
            yield "--on_bad_sample=skip: bad samples are found when latents are cached; leave out --cache_latents=off"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer: AdamW and the learning rate."""

    learning_rate: float = setting(5e-6, sweepable=True)
    """Learning rate after warm-up."""
    scale_lr: bool = setting(False, sweepable=True)
    """Multiply the learning rate by workers x accumulation steps x batch size."""
    lr_scheduler: str = setting("constant", sweepable=True, decides="warm-up")
    """linear, cosine, cosine_with_restarts, polynomial, constant or constant_with_warmup."""
    lr_warmup_steps: int = setting(500, sweepable=True, decides="warm-up")
    """Warm-up in optimizer updates (`constant` ignores it)."""
    lr_num_cycles: int = setting(1, sweepable=True)
    """Hard restarts of cosine_with_restarts."""
    lr_power: float = setting(1.0, sweepable=True)
    """Power of polynomial."""
    use_8bit_adam: bool = setting(False, sweepable=True, package=("bitsandbytes", "8bit"))
    """AdamW8bit of bitsandbytes: pip install 'raycontrolnet[8bit]'."""
    adam_beta1: float = setting(0.9, sweepable=True)
    """AdamW's beta1."""
    adam_beta2: float = setting(0.999, sweepable=True)
    """AdamW's beta2."""
    adam_weight_decay: float = setting(1e-2, sweepable=True)
    """AdamW's weight decay."""
    adam_epsilon: float = setting(1e-8, sweepable=True)
    """AdamW's epsilon."""
    max_grad_norm: float = setting(1.0, sweepable=True)
    """Gradients are clipped to this norm at every update."""
    set_grads_to_none: bool = setting(False, sweepable=True)
    """Free the gradients after an update instead of setting them to zero; a run of one process on a CPU always does."""

    def problems(self) -> Problems:
        yield from one_of(self, "lr_scheduler", LR_SCHEDULERS)
        yield from at_least(self, 0, "learning_rate", "lr_warmup_steps", "adam_weight_decay", "adam_epsilon")
        yield from at_least(self, 1, "lr_num_cycles")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield problem_of(self, name, "must be in [0, 1)")
        if self.max_grad_norm <= 0:
            yield problem_of(self, "max_grad_norm", "must be above 0")


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Training: an update, and the number of updates."""

    seed: int | None = setting(
        None, decides_measurement="which rows are held out, and with which noise they are measured"
    )
    """Seed for a reproducible run; without it, one is drawn and written to config.yaml."""
    train_batch_size: int = setting(4, sweepable=True, decides="length")
    """Samples per worker (device) in one forward pass."""
    num_train_epochs: int = setting(1, sweepable=True, decides="length")
    """Passes over the data."""
    max_train_steps: int | None = setting(None, sweepable=True, decides="length")
    """Optimizer updates; overrides num_train_epochs."""
    gradient_accumulation_steps: int = setting(1, sweepable=True, decides="length")
    """Forward and backward passes per update."""
    gradient_checkpointing: bool = setting(False, sweepable=True)
    """Recompute activations in the backward pass (ControlNet and frozen UNet): slower, far less memory."""
    mixed_precision: str | None = setting(None, sweepable=True, gpu_only=("fp16", "use bf16 or no on the CPU"))
    """no, fp16 or bf16 (the default on GPUs that have it). The ControlNet's weights stay fp32."""
    allow_tf32: bool = setting(False, sweepable=True)
    """TF32 matrix products and convolutions on Ampere GPUs and later; never for the latent cache."""
    enable_xformers_memory_efficient_attention: bool = setting(
        False, sweepable=True, package=("xformers", "xformers"), gpu_only=(True, "leave it out on the CPU")
    )
    """Attention by xformers (needs a CUDA GPU): pip install 'raycontrolnet[xformers]'."""
    compile: bool = setting(False, sweepable=True)
    """Compile the UNet and the ControlNet for the training step (torch.compile): some minutes at the start."""
    cuda_graphs: str = setting("auto", sweepable=True)
    """Launch a step's passes as a CUDA graph, in bf16 or fp16 without --compile: auto (of one worker), on, off."""
    on_nan: str = setting("fail", changes_on_resume=True, fixed=FAULTS)
    """Reaction to an update whose loss or gradient is not finite, which is never taken: fail, or skip it."""
    max_nan: int = setting(10, changes_on_resume=True, fixed=FAULTS)
    """Most updates that --on_nan skip may leave out, counted anew when workers start again."""

    def problems(self) -> Problems:
        yield from at_least(self, 1, "train_batch_size", "num_train_epochs", "max_train_steps")
        yield from at_least(self, 1, "gradient_accumulation_steps")
        yield from one_of(self, "mixed_precision", MIXED_PRECISIONS)
        yield from one_of(self, "cuda_graphs", GRAPH_MODES)
        yield from one_of(self, "on_nan", BAD_SAMPLES)
        yield from at_least(self, 1, "max_nan")
        if self.compile and self.enable_xformers_memory_efficient_attention:
            yield problem_of(
                self, "compile", "does not go with --enable_xformers_memory_efficient_attention; leave out one"
            )
        yield from seed_problems(self)
