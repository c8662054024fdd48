"""Which settings a sweep may try: every setting of `TrainConfig` is in exactly one of four tables.

A new setting goes into one of them, too; a test says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.errors import ConfigError

SWEEPABLE = frozenset({
    # where training starts, and what of the data it sees
    "controlnet_model_name_or_path", "tokenizer_name", "proportion_empty_prompts",
    # the optimizer
    "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "use_8bit_adam",
    "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "set_grads_to_none",
    # an update, and how many
    "train_batch_size", "num_train_epochs", "max_train_steps", "gradient_accumulation_steps",
    "gradient_checkpointing", "mixed_precision", "allow_tf32", "enable_xformers_memory_efficient_attention",
})  # fmt: skip
"""All trials use one latent cache, whatever their values."""

NEEDS_CACHE = frozenset({
    "pretrained_model_name_or_path", "revision", "variant", "dataset_name", "dataset_config_name", "train_data_dir",
    "image_column", "conditioning_image_column", "caption_column", "resolution", "latents_dtype",
})  # fmt: skip
"""They decide what is in the latent cache: the VAE, the rows, or how they are stored."""

MEASUREMENT: Mapping[str, str] = {
    "seed": "decides which rows are held out, and with which noise they are measured",
    "max_train_samples": "decides which rows there are to train on and to hold out",
    "validation_split": "decides which rows are held out",
    "validation_steps": "decides after which updates trials are measured",
    "validation_prompt": "decides which images are scored",
    "validation_image": "decides which images are scored",
    "num_validation_images": "decides how many images are scored",
    "guidance_scale": "decides how the scored images are made",
    "control_fidelity": "decides how images are scored",
}
"""What trials are compared by -> why it must be the same for all."""


def _alike(reason: str, *names: str) -> dict[str, str]:
    return {name: f"it {reason}; for all trials alike there is --{name}" for name in names}


PLACE_OR_MACHINE: Mapping[str, str] = {
    "output_dir": "every trial gets a folder of its own in the sweep's; name that one with --output_dir",
    "resume_from_checkpoint": "trials start from the beginning; --resume goes on with a sweep",
    "hub_token": "it is a secret, and changes nothing that is learnt; set HF_TOKEN",
    **_alike("says where figures go, not what is learnt", "logging_dir", "report_to", "tracker_group",
             "tracker_project_name"),
    **_alike("is about publishing, not about training", "push_to_hub", "hub_model_id", "license"),
    **_alike("says when checkpoints are written, not what is learnt", "checkpointing_steps", "checkpoints_total_limit"),
    **_alike(
        "says what the machines do, not what is learnt",
        "address", "num_workers", "use_gpu", "cpus_per_worker", "accelerator_type", "max_failures",
        "dataloader_num_workers",
    ),
    **_alike(
        "says where files are kept or how latents are made, which all trials share",
        "cache_dir", "latents_cache_dir", "cache_latents", "latents_batch_size", "on_bad_sample", "max_bad_fraction",
    ),
}  # fmt: skip
"""Where things go and what the machine does -> why it cannot be swept, and what to do instead."""


def cache_settings(names: Iterable[str]) -> list[str]:
    """Those that need latents of their own, sorted."""
    return sorted(NEEDS_CACHE.intersection(names))


def refusal(name: str, objective: str) -> str | None:
    """Why the setting `name` can never be swept, whatever its values; None if it can.

    Args:
        objective: what trials are ranked by.
    """
    if name in SWEEPABLE or name in NEEDS_CACHE:
        return None
    if name in MEASUREMENT:
        why = f"it {MEASUREMENT[name]}, so that the {objective} of trials could not be compared"
        return f"cannot be swept: {why}; for all trials alike there is --{name}"
    return f"cannot be swept: {PLACE_OR_MACHINE[name]}"


def cache_problems(name: str, train: TrainConfig, *, allow_new_caches: bool) -> list[str]:
    """What keeps the values of `name` from having latents of their own, if they need them."""
    if name not in NEEDS_CACHE or train.cache_latents == "off":
        return []
    if not allow_new_caches:
        why = "each value needs a latent cache of its own, which takes time and disk"
        return [f"{why}; add --allow_new_caches if that is meant"]
    if train.latents_cache_dir is not None:
        why = f"each value needs a latent cache of its own, and --latents_cache_dir={train.latents_cache_dir} holds one"
        return [f"{why}; leave --latents_cache_dir out, so that each gets a folder"]
    return []


def run_problems(name: str, value: Any, train: TrainConfig) -> list[str]:
    """What a run of `train` with another `value` of `name` would be refused for; each line starts with the value."""
    try:
        dataclasses.replace(train, **{name: value})
    except ConfigError as error:
        flags = (f"--{name}={value}: ", f"--{name}={value!r}: ", f"--{name}: ")
        return [f"{str(value) or repr(value)}: {_without(flags, problem)}" for problem in error.problems]
    return []


def _without(prefixes: tuple[str, ...], text: str) -> str:
    found = next((prefix for prefix in prefixes if text.startswith(prefix)), "")
    return text.removeprefix(found)
