"""Every setting, declared once, in the group of the part of the program that needs it.

A function that needs only the optimizer's settings takes an `OptimConfig`; `config.TrainConfig` is all groups together
under flat names, so that the command line (`--learning_rate 1e-5`), YAML (`learning_rate: 1e-5`), Python
(`TrainConfig(learning_rate=1e-5)`), a sweep's space and a checkpoint's manifest use one name for a setting.

To add a setting: add a field with its docstring to the group of its owner and, if some values cannot be run, a line to
that group's `problems`. This module imports neither torch nor ray, so that `--help` and bad flags answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from raycontrolnet.config.rules import (
    Problems,
    at_least,
    holds_secret,
    one_of,
    problem_of,
    resolution_problems,
    seed_problems,
)

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
MIXED_PRECISIONS = ("no", "fp16", "bf16")
CACHE_MODES = ("auto", "on", "off")
LATENTS_DTYPES = ("float16", "float32")
BAD_SAMPLES = ("fail", "skip")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Model"""

    pretrained_model_name_or_path: str = ""
    """Base model: a local folder or a Hub id, Stable Diffusion 1.x or 2.x. Required."""
    controlnet_model_name_or_path: str | None = None
    """ControlNet to start from; without it, its weights are copied from the base model's UNet."""
    revision: str | None = None
    """Revision (branch, tag or commit) of the base model on the Hub."""
    variant: str | None = None
    """File variant of the base model, such as fp16."""
    tokenizer_name: str | None = None
    """Tokenizer, if not the base model's: a local folder or a Hub id."""
    cache_dir: str | None = None
    """Where downloaded models and data sets go."""

    def problems(self) -> Problems:
        if not self.pretrained_model_name_or_path:
            yield "--pretrained_model_name_or_path: required; a local folder or a Hub id of a Stable Diffusion model"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data"""

    dataset_name: str | None = None
    """A data set's Hub id, or a local path that datasets.load_dataset reads (or a saved arrow data set)."""
    dataset_config_name: str | None = None
    """Which configuration of the data set, if it has several."""
    train_data_dir: str | None = None
    """A folder with images and metadata.jsonl (or prompt.json, the original ControlNet layout)."""
    image_column: str = "image"
    """Column of the target images."""
    conditioning_image_column: str = "conditioning_image"
    """Column of the conditioning images."""
    caption_column: str = "text"
    """Column of the captions: a string, or a list of strings of which one is drawn for every use."""
    max_train_samples: int | None = None
    """Train on a seeded random subset of this many rows, the same on every worker."""
    proportion_empty_prompts: float = 0.0
    """Share of prompts replaced by the empty one, in [0, 1]."""
    resolution: int = 512
    """Images are resized (short side) and centre-cropped to this many pixels; divisible by 8."""

    def problems(self) -> Problems:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            given = "neither is given" if self.dataset_name is None else "both are given"
            yield f"--train_data_dir, --dataset_name: give one of them ({given})"
        if not 0 <= self.proportion_empty_prompts <= 1:
            yield problem_of(self, "proportion_empty_prompts", "must be in [0, 1]")
        yield from resolution_problems(self)
        if self.dataset_config_name is not None and self.dataset_name is None:
            yield problem_of(self, "dataset_config_name", "needs --dataset_name")
        yield from at_least(self, 1, "max_train_samples")


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Latents"""

    cache_latents: str = "auto"
    """Encode every image once and train from the stored latents: on, off, or auto (if images are used again)."""
    latents_cache_dir: str | None = None
    """Folder or object-store URI of the cached latents; by default one of ~/.cache/raycontrolnet/latents."""
    latents_dtype: str = "float16"
    """float16 or float32: precision of the stored latents."""
    latents_batch_size: int = 4
    """Images that the VAE encodes at a time."""
    on_bad_sample: str = "fail"
    """What an image that cannot be used does to `prepare`: fail (with the list, at the end), or skip it."""
    max_bad_fraction: float = 0.01
    """Largest share of samples that may be skipped, in [0, 1]."""

    def problems(self) -> Problems:
        yield from one_of(self, "cache_latents", CACHE_MODES)
        yield from one_of(self, "latents_dtype", LATENTS_DTYPES)
        yield from one_of(self, "on_bad_sample", BAD_SAMPLES)
        yield from at_least(self, 1, "latents_batch_size")
        if not 0 <= self.max_bad_fraction <= 1:
            yield problem_of(self, "max_bad_fraction", "must be in [0, 1]")
        if self.latents_cache_dir == "":
            yield "--latents_cache_dir: must name a folder; leave it out for the default one"
        elif self.latents_cache_dir and holds_secret(self.latents_cache_dir):
            yield "--latents_cache_dir: leave keys and tokens out of the URI; put them into the machines' environment"
        if self.cache_latents == "off" and self.on_bad_sample == "skip":
            yield "--on_bad_sample=skip: bad samples are found when latents are cached; leave out --cache_latents=off"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer"""

    learning_rate: float = 5e-6
    """Learning rate after warm-up."""
    scale_lr: bool = False
    """Multiply the learning rate by workers x accumulation steps x batch size."""
    lr_scheduler: str = "constant"
    """linear, cosine, cosine_with_restarts, polynomial, constant or constant_with_warmup."""
    lr_warmup_steps: int = 500
    """Warm-up in optimizer updates (`constant` ignores it)."""
    lr_num_cycles: int = 1
    """Hard restarts of cosine_with_restarts."""
    lr_power: float = 1.0
    """Power of polynomial."""
    use_8bit_adam: bool = False
    """AdamW8bit of bitsandbytes: pip install 'raycontrolnet[8bit]'."""
    adam_beta1: float = 0.9
    """AdamW's beta1."""
    adam_beta2: float = 0.999
    """AdamW's beta2."""
    adam_weight_decay: float = 1e-2
    """AdamW's weight decay."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm at every update."""
    set_grads_to_none: bool = False
    """Free the gradients after an update instead of setting them to zero."""

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
    """Training"""

    seed: int | None = None
    """Makes the run reproducible; without it one is drawn and written to config.yaml."""
    train_batch_size: int = 4
    """Samples per worker (device) in one forward pass."""
    num_train_epochs: int = 1
    """Passes over the data."""
    max_train_steps: int | None = None
    """Optimizer updates; overrides num_train_epochs."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes per update."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (ControlNet and frozen UNet): slower, far less memory."""
    mixed_precision: str | None = None
    """no, fp16 or bf16. The ControlNet's weights stay fp32."""
    allow_tf32: bool = False
    """TF32 matrix products on Ampere GPUs and later."""
    enable_xformers_memory_efficient_attention: bool = False
    """Attention by xformers (needs a CUDA GPU): pip install 'raycontrolnet[xformers]'."""

    def problems(self) -> Problems:
        yield from at_least(self, 1, "train_batch_size", "num_train_epochs", "max_train_steps")
        yield from at_least(self, 1, "gradient_accumulation_steps")
        yield from one_of(self, "mixed_precision", MIXED_PRECISIONS)
        yield from seed_problems(self)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Ray"""

    address: str | None = None
    """Ray cluster to run on (`auto` for the one on this machine); by default RAY_ADDRESS, or else a local Ray."""
    num_workers: str = "1"
    """Workers (devices) N; MIN:MAX for as many as the cluster has; 0 trains in this process, for debugging."""
    use_gpu: bool | None = None
    """Train on GPUs; by default if the cluster has one."""
    cpus_per_worker: float | None = None
    """CPUs a worker reserves, and its threads; by default the machine's share, less one for loading data."""
    accelerator_type: str | None = None
    """GPU type that workers ask for, such as A100 or H100."""
    max_failures: int = 3
    """How often a run continues by itself after losing a worker."""
    dataloader_num_workers: int = 0
    """Loading tasks at a time per worker (0: chosen for the machine)."""

    def problems(self) -> Problems:
        yield from at_least(self, 0, "max_failures", "dataloader_num_workers")
        if self.cpus_per_worker is not None and self.cpus_per_worker <= 0:
            yield problem_of(self, "cpus_per_worker", "must be above 0")
        try:
            low, high = self.worker_range
        except ValueError:
            yield problem_of(self, "num_workers", "must be a number, or MIN:MAX")
        else:
            if low < 0 or high < low or (low != high and low < 1):
                yield problem_of(self, "num_workers", "must be 0 or more, or MIN:MAX with 1 <= MIN <= MAX")

    @property
    def worker_range(self) -> tuple[int, int]:
        """(fewest, most) workers; the same number twice unless elastic."""
        low, _, high = str(self.num_workers).partition(":")
        return int(low), int(high or low)
