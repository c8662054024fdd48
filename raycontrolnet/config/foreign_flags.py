"""Flags of accelerate and of other training scripts -> what takes their place here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath

_WORKERS = "write --num_workers N, for N GPUs, in place of the launcher's flags"
_MACHINES = "leave it out: Ray finds the machines of its cluster; see --num_workers and --address"
_SHARDS = "leave it out: every worker has the whole model; --gradient_checkpointing needs less memory"
_OTHER_BASES = "is for Stable Diffusion 3 or Flux, which raycontrolnet does not train; leave it out"
_VAE = "leave it out: SDXL's VAE runs in fp32, unless --pretrained_vae_model_name_or_path names another"
_CHECKPOINTS = "write --checkpointing_steps N, in updates"
_EMPTY_PROMPTS = "write --proportion_empty_prompts"

ADVICE: Mapping[str, str] = {
    **dict.fromkeys(("multi_gpu", "num_processes", "nproc_per_node"), _WORKERS),
    **dict.fromkeys(
        ("num_machines", "machine_rank", "main_process_ip", "main_process_port", "same_network"), _MACHINES
    ),
    **dict.fromkeys(("nnodes", "node_rank", "master_addr", "master_port", "rdzv_backend"), _MACHINES),
    **dict.fromkeys(("use_deepspeed", "deepspeed_config_file", "zero_stage", "use_fsdp"), _SHARDS),
    "config_file": "write --num_workers and --mixed_precision in place of accelerate's file",
    "num_cpu_threads_per_process": "write --cpus_per_worker N",
    "gpu_ids": "set CUDA_VISIBLE_DEVICES",
    "dynamo_backend": "write --compile",
    "enable_npu_flash_attention": "is for Ascend NPUs, on which raycontrolnet does not run; leave it out",
    **dict.fromkeys(("weighting_scheme", "mode_scale"), _OTHER_BASES),
    **dict.fromkeys(("num_double_layers", "num_single_layers", "num_extra_conditioning_channels"), _OTHER_BASES),
    **dict.fromkeys(("upcast_vae", "no_half_vae"), _VAE),
    "train_text_encoder": "leave it out: the ControlNet alone is trained",
    "non_ema_revision": "write --revision",
    "condition_type": "make the conditioning images first, by raycontrolnet condition",
    **dict.fromkeys(("save_steps", "save_every_n_steps", "save_every_n_epochs"), _CHECKPOINTS),
    **dict.fromkeys(("conditioning_dropout_prob", "caption_dropout_rate"), _EMPTY_PROMPTS),
    "batch_size": "write --train_batch_size",
    "lr": "write --learning_rate",
    "max_steps": "write --max_train_steps",
    **dict.fromkeys(("max_train_epochs", "num_epochs", "epochs"), "write --num_train_epochs"),
    "output_name": "write --save_name",
    "min_snr_gamma": "write --snr_gamma",
    "enable_bucket": "write --aspect_buckets",
    "flip_aug": "write --random_flip",
    "optimizer_type": "write --optimizer MODULE.CLASS, such as torch.optim.RAdam",
    "max_data_loader_n_workers": "write --dataloader_num_workers",
    "cache_latents_to_disk": "write --cache_latents on",
    "conditioning_data_dir": "put images and conditioning_images, with equal names, into one folder: --train_data_dir",
    "xformers": "write --enable_xformers_memory_efficient_attention",
    "sdpa": "leave it out: it is the default",
    "v_parameterization": "leave it out: it is found in the base model's files",
}
"""Flag -> the words after it in a message."""
SCRIPT_FLAGS = frozenset(("enable_npu_flash_attention",))
"""Flags of diffusers' ControlNet scripts, which may be abbreviated as there."""
SCRIPTS = frozenset(f"train_controlnet{end}.py" for end in ("", "_sdxl", "_sd3", "_flux"))


def foreign_names(names: Iterable[str], start: str, known: Iterable[str]) -> list[str]:
    """Return a problem, beginning with `start`, for each of the `names` that other scripts have and `known` lacks."""
    ours = frozenset(known)
    return [f"{start}{name}: {ADVICE[name]}" for name in dict.fromkeys(names) if name in ADVICE and name not in ours]


def stray_words(command: str, flags: Sequence[str]) -> list[str]:
    """Return a problem for a launcher and its script among the arguments, and for a blank that ends them.

    A backslash with a blank behind it does not join two lines: the shell passes the blank, and drops what follows.
    """
    first = next((place for place, flag in enumerate(flags) if flag.startswith(("-", "–", "—"))), len(flags))
    words = [*flags[:first], *(flag for flag in flags[first:] if PurePath(flag).name in SCRIPTS)]
    words = [word for word in words if word.strip()]
    problems = []
    if words:
        problems.append(f"{' '.join(words)}: leave it out; flags alone follow raycontrolnet {command}")
    if flags and flags[-1] and not flags[-1].strip() and not (len(flags) > 1 and flags[-2].startswith("-")):
        problems.append(f'"{flags[-1]}": is the last argument; delete the blank behind the backslash of its line')
    return problems
