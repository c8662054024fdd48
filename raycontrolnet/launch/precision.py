"""Precision of a run that names none: that of its checkpoint, or bf16 on GPUs that have it.

The driver decides, after the latents are encoded and before the workers start: they all get the same setting, and it
stands in config.yaml, run.json, manifests and the model card as if it had been given.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import TextIO

from raycontrolnet.cluster.gpus import Question, gpus_have_bf16
from raycontrolnet.cluster.resources import WorkerResources
from raycontrolnet.launch.checked_run import CheckedRun
from raycontrolnet.launch.waiting import waiting_for_workers
from raycontrolnet.storage.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

NO = "no"
FP16 = "fp16"
BF16 = "bf16"


def resolve(
    given: str | None, trained: str | None, *, use_gpu: bool, has_bf16: Callable[[], bool], by: str = "before"
) -> tuple[str | None, str]:
    """Return the precision to train in, and what to say of it if it was not given.

    Args:
        given: `--mixed_precision`.
        trained: precision of the part of the training that goes on; None for a new one.
        use_gpu: the workers have GPUs.
        has_bf16: checks whether these compute in bf16; called only if that decides.
        by: names what was trained before, in words.

    Returns:
        The precision, None for fp32 on a CPU; and the reason, empty if there is nothing to say.
    """
    if given is not None:
        return given, ""
    if trained is not None:
        if not use_gpu and trained in (NO, FP16):  # a CPU has no fp16
            return None, ""
        return trained, f"as {by}; --mixed_precision changes it"
    if not use_gpu:
        return None, ""
    if has_bf16():
        return BF16, "the default on GPUs that have it; --mixed_precision no trains in fp32"
    return NO, "not all of these GPUs have bf16; --mixed_precision fp16 needs less memory"


def trained_in(start: Checkpoint | None) -> str | None:
    """Return the precision that a checkpoint was trained in; None without one, or if its manifest does not tell."""
    settings = start.manifest.get("settings") if start else None
    return (settings.get("mixed_precision") or NO) if isinstance(settings, dict) else None


def with_precision(run: CheckedRun, *, use_gpu: bool, has_bf16: Callable[[], bool]) -> CheckedRun:
    """Return the run with the precision that it trains in."""
    by = run.start.path.name if run.start else ""
    given, trained = run.config.mixed_precision, trained_in(run.start)
    precision, reason = resolve(given, trained, use_gpu=use_gpu, has_bf16=has_bf16, by=by)
    config = dataclasses.replace(run.config, mixed_precision=precision)
    return dataclasses.replace(run, config=config, precision_reason=reason)


def in_words(precision: str, reason: str) -> str:
    """Return `bf16 (the default on ...)`."""
    return ("fp32" if precision == NO else precision) + (f" ({reason})" if reason else "")


def workers_have_bf16(resources: WorkerResources, wait_timeout_s: float | None, stream: TextIO) -> bool:
    """Check whether the workers' GPUs compute in bf16; wait for one, as the run will, if none is up that can tell.

    The same command then trains in the same precision, whether the cluster's nodes are up or not.

    Raises:
        RunError: after `wait_timeout_s` seconds without such a node.
    """
    if (known := gpus_have_bf16(resources)) is not None:
        return known
    question = Question(resources)
    try:
        with waiting_for_workers(lambda: True, question.withdraw, resources, wait_timeout_s, stream):
            return question.answer()
    except ConnectionError as error:
        logger.warning("no GPU has said whether it has bf16: %s", error)
        return False
    finally:
        question.withdraw()
