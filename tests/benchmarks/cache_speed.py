"""Speed of the latent cache: writing it, reading it, and ten epochs with it from start to end.

    python tests/benchmarks/cache_speed.py encode    # images/s of `prepare` against a bare loop of VAE encodes
    python tests/benchmarks/cache_speed.py load      # samples/s with one CPU, from the cache and from pixels
    python tests/benchmarks/cache_speed.py epochs    # ten epochs, from the command to its end, against the bare loop

The model and the images are those of train_speed.py, which measures the steady state of training.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reference_loop import ImageFolder
from train_speed import RESOLUTION, raycontrolnet, timed, write_inputs

THREADS = 2
BATCH_SIZE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["encode", "load", "epochs", "bare"])
    parser.add_argument("--images", type=int, help="of the data set")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="of the inputs (bare: runs the bare loop of `encode` on them)")
    args = parser.parse_args()
    if args.what == "bare":
        print(bare_encoding(args.folder))
        return
    with tempfile.TemporaryDirectory(prefix="raycontrolnet-speed-") as temporary:
        folder = Path(temporary)
        images = args.images or {"encode": 256, "load": 256, "epochs": 192}[args.what]
        write_inputs(folder, images)
        {"encode": encode, "load": load, "epochs": epochs}[args.what](folder, images, args.repeats)


def encode(folder: Path, images: int, repeats: int) -> None:
    """Compare one actor, after its first shard, with a loop that only reads and encodes."""
    ours, bare = [], []
    for repeat in range(repeats):
        this = [sys.executable, __file__, "bare", "--folder", str(folder)]
        bare.append(float(subprocess.run(this, check=True, capture_output=True, text=True).stdout))
        cache = folder / f"cache-{repeat}"
        command = raycontrolnet("prepare", folder, ["--latents_cache_dir", str(cache), "--cpus_per_worker", "2"])
        timed(command, folder / "prepare.log")
        times = sorted(path.stat().st_mtime for path in cache.glob("*.arrow"))
        ours.append(images * (len(times) - 1) / len(times) / (times[-1] - times[0]))
        print(f"# bare {bare[-1]:.3g}, prepare {ours[-1]:.3g} images/s", file=sys.stderr, flush=True)
    ratio = statistics.median(ours) / statistics.median(bare)
    print("| | images/s |\n|---|---|")
    print(f"| bare loop of VAE encodes | {shown(bare)} |\n| prepare, one actor | {shown(ours)} |")
    print(f"| ratio (goal: at least 0.9) | {ratio:.3f} |")


def bare_encoding(folder: Path) -> float:
    """Measure images/s of PIL and VAE alone."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    torch.set_num_threads(THREADS)
    vae = AutoencoderKL.from_pretrained(folder / "base", subfolder="vae")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "base", subfolder="tokenizer")
    images = ImageFolder(folder / "data", RESOLUTION, tokenizer)
    first = time.perf_counter()
    with torch.no_grad():
        for start in range(0, len(images), BATCH_SIZE):
            if start == 32:  # as for `prepare`, the first 32 images are not counted
                first = time.perf_counter()
            batch = [images[index]["pixel_values"] for index in range(start, min(len(images), start + BATCH_SIZE))]
            vae.encode(torch.stack(batch)).latent_dist.sample()
    return (len(images) - 32) / (time.perf_counter() - first)


def load(folder: Path, images: int, repeats: int) -> None:
    """Measure samples/s of one process with one thread, in the order of training."""
    import torch

    from raycontrolnet import TrainConfig, prepare
    from raycontrolnet.data.decoding import prepared
    from raycontrolnet.data.order import SampleOrder
    from raycontrolnet.data.sample_rows import PixelRows
    from raycontrolnet.data.sources import open_source
    from raycontrolnet.data.stream import BatchLoader
    from raycontrolnet.latents.cache import LatentCache
    from raycontrolnet.latents.plan import LatentPlan
    from raycontrolnet.model.families.stable_diffusion import STABLE_DIFFUSION

    torch.set_num_threads(THREADS)
    config = TrainConfig(
        pretrained_model_name_or_path=str(folder / "base"),
        train_data_dir=str(folder / "data"),
        latents_cache_dir=str(folder / "cache"),
        resolution=RESOLUTION,
        num_workers="0",
    )
    prepare(config)
    source = open_source(config)
    plan = LatentPlan.of(config, source, STABLE_DIFFUSION, None)
    assert plan.manifest is not None
    order = SampleOrder(len(source), 0)
    cached = BatchLoader(LatentCache.of(plan.folder, plan.manifest, plan.shards), order, BATCH_SIZE, 0.0)
    pixels = BatchLoader(PixelRows(source, RESOLUTION), order, BATCH_SIZE, 0.0)
    rates: dict[str, list[float]] = {"from pixels": [], "from the cache": []}
    for _ in range(repeats):
        for name, loader in zip(rates, (pixels, cached), strict=True):
            start = time.perf_counter()
            for first in range(0, 4 * images, BATCH_SIZE):
                for row in loader.batch(first):
                    prepared(row)
            rates[name].append(4 * images / (time.perf_counter() - start))
    print("| one CPU | samples/s |\n|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {shown(values)} |")


def epochs(folder: Path, images: int, repeats: int) -> None:
    """Time ten epochs: with Ray's start, the cache and the final save on our side; with model loading on both."""
    steps = 10 * images // BATCH_SIZE
    reference = [sys.executable, str(Path(__file__).with_name("reference_loop.py")), "--base", str(folder / "base")]
    reference += ["--controlnet", str(folder / "controlnet"), "--data", str(folder / "data"), "--steps", str(steps)]
    ours: list[float] = []
    bare: list[float] = []
    for repeat in range(repeats):
        output = folder / f"out-{repeat}"
        flags = ["--controlnet_model_name_or_path", str(folder / "controlnet"), "--train_batch_size", str(BATCH_SIZE)]
        flags += ["--num_train_epochs", "10", "--output_dir", str(output), "--report_to", "none", "--seed", "0"]
        flags += ["--latents_cache_dir", str(folder / f"cache-{repeat}"), "--cpus_per_worker", str(THREADS)]
        for command, seconds in ((raycontrolnet("train", folder, flags), ours), (reference, bare)):
            start, end = timed(command, folder / "log")
            seconds.append(end - start)
            print(f"# {seconds[-1]:.0f} s: {' '.join(command[1:4])}", file=sys.stderr, flush=True)
        print(f"# {json.loads((output / 'run.json').read_text())['timings']}", file=sys.stderr, flush=True)
    print(f"| ten epochs of {images} images, {steps} updates | seconds |\n|---|---|")
    print(f"| bare loop | {shown(bare)} |\n| raycontrolnet, cache included | {shown(ours)} |")
    print(f"| ratio (goal: at least 1.25) | {statistics.median(bare) / statistics.median(ours):.3f} |")


def shown(values: list[float]) -> str:
    """Format the median, and the single runs in brackets."""
    return f"{statistics.median(values):.3g} ({', '.join(f'{value:.3g}' for value in values)})"


if __name__ == "__main__":
    main()
