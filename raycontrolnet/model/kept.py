"""Base models kept from one run to the next of the same process: for sweeps, whose trials share one.

Off, and nothing is kept, until a process says `keep_models()`. From then on `load_components` hands out the frozen
models of the run before, as they were when they had been read, if the next run asks for the same. One run must be over
before the next begins. What a run trains is never kept: each gets a ControlNet of its own, equal in every bit to the
one that it would get in a new process.
"""

from __future__ import annotations

import copy
import gc
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raycontrolnet.model.base import Base
from raycontrolnet.settings import ModelConfig

if TYPE_CHECKING:
    from diffusers import ControlNetModel

PARTS = ("scheduler", "unet", "tokenizer", "text_encoder", "vae")
"""Subfolders of a base model that are read."""


@dataclass(frozen=True)
class Identity:
    """What the frozen models depend on. Where they are equal, so are the models."""

    names: tuple[str | None, ...]
    device: torch.device
    dtype: torch.dtype
    files: tuple[tuple[str, int, int, int], ...]
    """Path, bytes, time of the last change in ns and inode of every file in local folders; of the Hub's the names
    suffice, which are resolved once a process."""

    @staticmethod
    def of(model: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> Identity:
        base, tokenizer = model.pretrained_model_name_or_path, model.tokenizer_name
        folders = [Path(base, part) for part in PARTS] + ([Path(tokenizer)] if tokenizer else [])
        return Identity(
            names=(base, model.revision, model.variant, tokenizer, model.cache_dir),
            device=device,
            dtype=dtype,
            files=tuple(sorted(found for folder in folders for found in _files(folder))),
        )


def _files(folder: Path) -> Iterator[tuple[str, int, int, int]]:
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file():
                    stat = entry.stat()
                    yield os.path.realpath(entry.path), stat.st_size, stat.st_mtime_ns, stat.st_ino


@dataclass
class Kept:
    """A base model, and what makes it new again."""

    identity: Identity
    base: Base
    """On its device, in its dtype. The tokenizer is never handed out, copies of it are: it has states."""
    processors: Mapping[str, Any]
    """The UNet's attention processors, by name."""
    initial: ControlNetModel | None
    """On the CPU, in fp32: with what training began when it was last copied from the UNet, whose own weights may be
    rounded by now. None if no run has begun so."""
    seed: int
    """Of `initial`."""
    trained: weakref.ref[torch.Tensor] | None = None
    """A weight of the last run's ControlNet, alive for as long as that or its optimizer is."""

    def renewed(self) -> Base:
        """The models without what a run has switched on in them."""
        self.base.unet.disable_gradient_checkpointing()
        self.base.unet.set_attn_processor(dict(self.processors))
        return replace(self.base, tokenizer=copy.deepcopy(self.base.tokenizer))


_on = False
_kept: Kept | None = None


def keep_models() -> None:
    """From now on this process keeps the base model of its last run for the next one."""
    global _on
    _on = True


def forget_models() -> None:
    """Let go of what is kept, and keep nothing any more."""
    global _on
    _on = False
    _drop()


def identity_if_kept(model: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> Identity | None:
    """Under which the models are to be kept; None if nothing is."""
    return Identity.of(model, device=device, dtype=dtype) if _on else None


def find(identity: Identity, *, initial: bool) -> Kept | None:
    """What is kept of `identity`; if that is nothing, another base model is let go, so that there are never two.

    The last run's ControlNet, with its gradients and moments, is gone afterwards.

    Args:
        initial: whether `Kept.initial` is needed.
    """
    if _kept and _kept.identity == identity and (_kept.initial is not None or not initial):
        _collect(_kept.trained)
        return _kept
    _drop()
    return None


def keep(identity: Identity, base: Base, initial: ControlNetModel | None, seed: int) -> Kept:
    """Keep `base`, which is ready to be used, and a copy of the ControlNet with which training begins."""
    global _kept
    _kept = Kept(
        identity=identity,
        base=replace(base, tokenizer=copy.deepcopy(base.tokenizer)),
        processors=base.unet.attn_processors,
        initial=copy.deepcopy(initial),
        seed=seed,
    )
    return _kept


def _drop() -> None:
    global _kept
    if _kept:
        gone = (weakref.ref(_kept.base.unet), _kept.trained)
        _kept = None
        _collect(*gone)


def _collect(*gone: weakref.ref[Any] | None) -> None:
    """Free what is held by itself alone, as models are that accelerate has wrapped for mixed precision.

    Python's search for such circles takes longer than reading a small model: only if it is needed.
    """
    if any(ref is not None and ref() is not None for ref in gone):
        gc.collect()
