"""Runs for tests, and the files that runs and commands leave."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from raycontrolnet import RunResult, TrainConfig, fit

Settings = dict[str, Any]
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Run(NamedTuple):
    """A finished run."""

    folder: Path
    result: RunResult
    shown: str
    """Its progress."""


def train(settings: dict[str, Any]) -> Run:
    """Run `fit` on `TrainConfig(**settings)`."""
    stream = io.StringIO()
    result = fit(TrainConfig(**settings), stream=stream)
    return Run(result.output_dir, result, stream.getvalue())


def flags(settings: Mapping[str, Any] | None = None, /, **changed: Any) -> list[str]:
    """Return settings as the arguments of a command: a flag with its value, or values, for each."""
    values = {**(settings or {}), **changed}.items()
    lists = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in values}
    return [part for name, parts in lists.items() for part in (f"--{name}", *map(str, parts))]


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file below `folder`: name -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def states(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Read every file below `folder`: name -> bytes, and when it was written."""
    return {name: (content, (folder / name).stat().st_mtime_ns) for name, content in contents(folder).items()}


def metadata(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of metadata.jsonl in `folder`."""
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def run(settings: Settings, output_dir: Path, **changed: Any) -> Path:
    """Train into `output_dir`, and return it."""
    fit(TrainConfig(**settings | {"output_dir": str(output_dir)} | changed), stream=io.StringIO())
    return output_dir


def check_resume_is_exact(settings: Settings, folder: Path, **changed: Any) -> None:
    """Train as a whole, and with a stop after two updates: losses and weights are the same, bit for bit."""
    whole = run(settings, folder / "whole", **changed)
    parts = run(settings, folder / "parts", **changed | {"max_train_steps": 2})
    run(settings, parts, **changed, resume_from_checkpoint="latest")
    assert losses(parts) == losses(whole)
    assert equal(weights(parts), weights(whole))


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file with one per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def column(output_dir: Path, name: str) -> list[Any]:
    """Return a figure of every update."""
    return [line[name] for line in lines(output_dir / "metrics.jsonl")]


def losses(output_dir: Path) -> list[float]:
    """Return the loss of every update."""
    return column(output_dir, "loss")


def weights(output_dir: Path) -> dict[str, Tensor]:
    """Return the final weights."""
    return load_file(output_dir / WEIGHTS)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Check that weights are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
