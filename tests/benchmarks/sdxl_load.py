"""Host memory that loading Stable Diffusion XL takes, at its published size, with random weights.

    python tests/benchmarks/sdxl_load.py FOLDER      # writes 7 GB into FOLDER once, and needs 20 GB of memory

A process of its own loads the base from files in half precision, as a worker does, and makes the ControlNet of the
UNet. Printed is the most memory that this process had, and how long it took.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from raycontrolnet import TrainConfig
from raycontrolnet.model.components import load_components
from raycontrolnet.model.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from raycontrolnet.model.files import local_files

sys.path.append(str(Path(__file__).parents[1]))

from base_model import write_random_xl_base
from full_size import SDXL, write_configurations
from random_models import built

GB = 1e9


def write_base(folder: Path) -> None:
    """Write the base in fp16, with the small base's tokenizers."""
    configurations = write_configurations(SDXL, folder.with_name("configurations"))
    config = TrainConfig(pretrained_model_name_or_path=str(configurations), train_data_dir=".")
    components = built(STABLE_DIFFUSION_XL, local_files(configurations), config, dtype=torch.float16)
    parts = {"unet": components.denoiser, "vae": components.vae.half()}
    parts |= dict(zip(("text_encoder", "text_encoder_2"), components.text_encoders, strict=True))
    for name, part in parts.items():
        part.save_pretrained(folder / name, max_shard_size="100GB")
    with tempfile.TemporaryDirectory() as small:
        tiny = write_random_xl_base(Path(small) / "tiny")
        for name in ("tokenizer", "tokenizer_2", "scheduler"):
            shutil.copytree(tiny / name, folder / name)
        shutil.copy(tiny / "model_index.json", folder)


def load(folder: Path) -> dict[str, float]:
    """Load the base as a worker does; return GB and seconds."""
    model = TrainConfig(pretrained_model_name_or_path=str(folder), train_data_dir=".")
    started = time.perf_counter()
    components = load_components(model, device=torch.device("cpu"), dtype=torch.bfloat16, seed=0)
    seconds = time.perf_counter() - started
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    modules = (*components.frozen(), components.controlnet)
    weights = sum(each.numel() * each.element_size() for module in modules for each in module.parameters())
    return {"most GB": most / GB, "weights GB": weights / GB, "seconds": seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--load", action="store_true", help="load only, in this process")
    args = parser.parse_args(arguments)
    base = args.folder / "sdxl"
    if args.load:
        print(json.dumps({name: round(value, 1) for name, value in load(base).items()}))
        return
    if not (base / "model_index.json").exists():
        write_base(base)
    subprocess.run([sys.executable, __file__, str(args.folder), "--load"], check=True)


if __name__ == "__main__":
    main()
