"""CPU time of loading from the latent cache, by kind of process, for workers that only count their samples.

    python tests/benchmarks/load_speed.py                    # this tree, eight workers
    python tests/benchmarks/load_speed.py --commit 8111b55   # and that commit, alternating

The cache is real: latents of 512 px in fp16, and grey edge maps of 50 to 100 kB. Everything runs as fast as the machine
lets it, on a local Ray. What is measured is CPU seconds per image; the cores for 1,200 images/s (eight H100 at 150) are
that times 1,200, an extrapolation. The workers' own time is what they need to receive and decode, not to train.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from raycontrolnet.data.stream import BatchLoader

ROOT = Path(__file__).parents[2]
RESOLUTION = 512
NUM_ROWS = 4096
"""Twice as many as a process keeps open shards for: every second read opens a file."""
NUM_CONTROLS = 64
"""Control images that are different."""
SHARD_ROWS = 32
RAY_CPUS = 2
TARGET = 1200
"""Images per second."""
POLL_S = 0.25
KINDS = ("coordinator", "loading tasks", "raylet, GCS, agents and the like", "workers")
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="measure this commit as well, in turn with this tree")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--bundle", type=int, help="batches of a block; by default as many as the run would take")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each measurement, after a warm-up")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args.workers, args.batch_size, args.seconds, args.bundle)))
        return
    with tempfile.TemporaryDirectory(prefix="raycontrolnet-load-") as temporary, trees(args.commit) as sides:
        png_bytes = write_cache(Path(temporary))
        found: dict[str, list[Figures]] = {name: [] for name in sides}
        for _ in range(args.repeats):
            for name, tree in sides.items():
                environment = os.environ | {"PYTHONPATH": f"{tree}{os.pathsep}{ROOT / 'tests'}"}
                own = ["--seconds", str(args.seconds), "--workers", str(args.workers)]
                own += ["--batch_size", str(args.batch_size)]
                own += ["--bundle", str(args.bundle)] if args.bundle else []
                command = [sys.executable, str(Path(__file__).resolve()), "--side", temporary, *own]
                done = subprocess.run(  # not here: Ray's workers would import from the working folder first
                    command, env=environment, cwd=temporary, check=True, stdout=subprocess.PIPE, text=True
                )
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"# {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    print(f"{args.workers} workers, batch {args.batch_size}, control images of {png_bytes / 1000:.0f} kB on average:\n")
    show(found)


@contextmanager
def trees(commit: str | None) -> Iterator[dict[str, Path]]:
    """Give name -> source tree of the sides to measure."""
    if commit is None:
        yield {"this tree": ROOT}
        return
    with tempfile.TemporaryDirectory(prefix="raycontrolnet-tree-") as temporary:
        tree, git = Path(temporary, "tree"), ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield {commit: tree, "this tree": ROOT}
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def show(found: dict[str, list[Figures]]) -> None:
    """Print the table of medians; nan is for a stream that stood still."""
    print(f"| CPU ms per image (cores at {TARGET:,} images/s) | {' | '.join(found)} |\n|---|{'---|' * len(found)}")
    driving = "coordinator and loading tasks"

    def row(name: str, form: str, values: list[float]) -> None:
        print(f"| {name} | {' | '.join(form.format(value, value * TARGET / 1000) for value in values)} |")

    def medians(name: str) -> list[float]:
        return [statistics.median(each[name] for each in runs) for runs in found.values()]

    for kind in KINDS:
        row(kind, "{0:.2f} ({1:.1f})", medians(kind))
    both = [sum(values) for values in zip(*map(medians, KINDS[:2]), strict=True)]
    row(f"{driving} (goal: 16 cores)", "{0:.2f} ({1:.1f})", both)
    row("images/s here", "{0:.0f}", medians("images/s"))
    row("seconds to the first batch, of the last worker", "{0:.1f}", medians("first batch"))


def edges(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return soft edges [512, 512], thinned as by a threshold, which compress as those of photographs."""
    rng, size = np.random.default_rng(seed), RESOLUTION
    field = np.zeros((size, size))
    for scale in (96, 48, 24, 12):
        coarse = rng.standard_normal((size // scale + 2,) * 2).astype(np.float32)
        field += np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)) * scale**0.5
    slope = np.hypot(*np.gradient(field))
    slope = np.clip(slope / np.quantile(slope, 0.99), 0, 1)
    return np.where(slope > 0.45, slope * 255, 0).astype(np.uint8)


def write_cache(folder: Path) -> float:
    """Write the shards; return the mean bytes of a control image."""
    from raycontrolnet.data.records import EncodedRow
    from raycontrolnet.latents.cache import shard_bytes
    from raycontrolnet.storage.folder import cache_folder

    pngs = []
    for seed in range(NUM_CONTROLS):
        stream = io.BytesIO()
        Image.fromarray(edges(seed)).save(stream, "PNG")
        pngs.append(stream.getvalue())
    rng, cache = np.random.default_rng(0), cache_folder(str(folder / "cache"))
    for start in range(0, NUM_ROWS, SHARD_ROWS):
        rows = []
        for row in range(start, start + SHARD_ROWS):
            posterior = rng.standard_normal((2, 4, RESOLUTION // 8, RESOLUTION // 8)).astype(np.float16)
            captions = (f"a photograph of number {row}, which somebody has described in a sentence or so",)
            rows.append(EncodedRow(row, posterior, pngs[row % NUM_CONTROLS], captions, f"{row}.png", (768, 1024)))
        cache.write(f"{start // SHARD_ROWS:06d}.arrow", shard_bytes(rows, ()))
    return statistics.fmean(map(len, pngs))


def loader_of(folder: Path, batch_size: int) -> BatchLoader:
    """Return the loader of a run from the cache."""
    from raycontrolnet.data.order import SampleOrder
    from raycontrolnet.data.stream import BatchLoader
    from raycontrolnet.latents.cache import LatentCache
    from raycontrolnet.latents.manifest import Encoding, Manifest, Shard, StoredShard
    from raycontrolnet.storage.folder import cache_folder

    cache = cache_folder(str(folder / "cache"))
    stored = [StoredShard(name, SHARD_ROWS, size) for name, size in sorted(cache.sizes().items())]
    planned = [Shard(s.name, tuple(range(i * SHARD_ROWS, (i + 1) * SHARD_ROWS))) for i, s in enumerate(stored)]
    manifest = Manifest(Encoding(vae="0" * 16, resolution=RESOLUTION, dtype="float16"), tuple(stored), (), {})
    return BatchLoader(LatentCache.of(cache, manifest, planned), SampleOrder(NUM_ROWS, seed=0), batch_size, 0.0)


def measure(folder: Path, num_workers: int, batch_size: int, seconds: float, bundle: int | None) -> Figures:
    """Return CPU ms per image by kind of process, images/s, and the seconds to the first batch.

    Args:
        bundle: batches of a block; None for as many as a run would take.
    """
    import ray
    from processes import start_ray

    from raycontrolnet.data import stream

    assert stream.__file__.startswith(os.environ["PYTHONPATH"].split(os.pathsep)[0]), stream.__file__
    start_ray(num_cpus=RAY_CPUS)
    loader = loader_of(folder, batch_size)
    # Earlier commits take every row for two decoded images.
    size = getattr(loader, "batch_bytes", None) or stream.batch_bytes(batch_size, RESOLUTION)  # type: ignore[attr-defined]
    layout = stream.StreamLayout(0, 10**7, batch_size, num_workers, bundle or stream.StreamLayout.bundle_for(size))

    class Worker:
        """Stands in for a training worker: takes its batches, looks at them and counts."""

        def __init__(self) -> None:
            self.samples, self.first = 0, 0.0

        def ready(self) -> None:
            """Answer once the process is there."""

        def run(self, share: Any) -> None:
            begun = time.monotonic()
            for rows in stream.ray_batches(share):
                assert rows[0].conditioning_image.shape == (RESOLUTION, RESOLUTION, 3)
                self.first = self.first or time.monotonic() - begun
                self.samples += len(rows)

        def seen(self) -> tuple[int, float]:
            return self.samples, self.first

    actor = ray.remote(num_cpus=0, max_concurrency=2)(Worker)
    workers = [actor.remote() for _ in range(num_workers)]
    ray.get([worker.ready.remote() for worker in workers])
    dataset = stream.ray_dataset(ray.put(loader), layout, None)
    dataset.context.execution_options = stream.execution_options(size, num_workers)
    shares = dataset.streaming_split(num_workers, equal=True)
    running = [worker.run.remote(share) for worker, share in zip(workers, shares, strict=True)]

    def seen() -> list[tuple[int, float]]:
        failed, _ = ray.wait(running, timeout=0)
        ray.get(failed)  # raises why
        return list(ray.get([worker.seen.remote() for worker in workers]))

    while not all(first for _, first in seen()):
        time.sleep(POLL_S)
    usage = Usage()
    usage.look_for(seconds / 4)
    before, images, begun = usage.by_kind(), sum(samples for samples, _ in seen()), time.monotonic()
    usage.look_for(seconds)
    after, images, took = usage.by_kind(), sum(samples for samples, _ in seen()) - images, time.monotonic() - begun
    first = max(first for _, first in seen())
    ray.shutdown()
    ms = {kind: 1000 * (after[kind] - before[kind]) / (images or math.nan) for kind in KINDS}
    return {**ms, "images/s": images / took, "first batch": first}


class Usage:
    """CPU seconds of all processes of this process's Ray, also of those that have ended meanwhile."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self.kinds: dict[int, str] = {}

    def look_for(self, seconds: float) -> None:
        """Look again and again for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.look()
            time.sleep(POLL_S)

    def look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                # A process's title is that of its task; an actor keeps its own.
                self.kinds[process.pid] = kind_of(" ".join(process.cmdline()) or process.name())
                self.seconds[process.pid] = sum(process.cpu_times()[:2])

    def by_kind(self) -> Figures:
        self.look()
        return {kind: sum(self.seconds[pid] for pid in self.kinds if self.kinds[pid] == kind) for kind in KINDS}


def kind_of(title: str) -> str:
    """Return the kind of a process of Ray, by its command or title."""
    if "ray::" not in title or "Agent" in title or "ray::_" in title:  # its own actors
        return KINDS[2]
    if "SplitCoord" in title:
        return KINDS[0]
    if "Worker" in title and "MapWorker" not in title:
        return KINDS[3]
    return KINDS[1]


if __name__ == "__main__":
    main()
