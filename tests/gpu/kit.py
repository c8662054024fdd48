r"""The GPU kit: what only a GPU can show of the training step, in nine minutes.

    PYTHONPATH=.:tests python tests/gpu/kit.py OUT [--minutes 9]

It needs torch, diffusers, transformers and accelerate, and neither Ray nor datasets. Sections: checks of the step,
memory beside the prediction, speed beside the common training script's loop, one profile. OUT/kit.json is written
after each part, so that a machine that goes away costs one part. On a CPU it does the checks alone.

For a machine with torch, transformers and accelerate that reaches no package index, fetch the rest before (and what
diffusers needs besides, as requests and Pillow, if it is not there):

    pip download --no-deps --dest .whl diffusers importlib_metadata zipp pytest pytest-xdist execnet pytest-timeout \
        iniconfig pluggy pygments

and there, with /tmp/site in PYTHONPATH, `python -m pip install --no-index --no-deps --target /tmp/site .whl/*.whl`.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import speed
import torch
from checks import checks as all_checks
from full_size import SD15, SD21
from predictions import predicted
from states import Base

from raycontrolnet.model.performance import working_precision
from raycontrolnet.predict.prediction import GIB

BASES: dict[str, Mapping[str, Mapping[str, Any]]] = {"SD 1.5": SD15, "SD 2.1": SD21}
BATCHES = (48, 32, 4)
PART_S, COMPILING_S, COMPILED_SPEED_S = 45.0, 90.0, 240.0
"""Time that a part may take: none is begun with less left. torch.compile took 184 s of the last on an H200."""


class Case(NamedTuple):
    """A run whose memory is measured and predicted."""

    base: str
    precision: str
    batch_size: int
    cached: bool = True
    gradient_checkpointing: bool = False


CASES = (
    Case("SD 1.5", "bf16", 4), Case("SD 1.5", "bf16", 32), Case("SD 1.5", "bf16", 48),
    Case("SD 1.5", "bf16", 4, gradient_checkpointing=True), Case("SD 1.5", "bf16", 48, gradient_checkpointing=True),
    Case("SD 1.5", "bf16", 32, cached=False), Case("SD 1.5", "no", 4), Case("SD 2.1", "bf16", 8),
)  # fmt: skip


@dataclass
class Report:
    """The results so far, in a file."""

    file: Path
    until: float
    """Monotonic seconds at which the kit must have ended."""
    content: dict[str, Any] = field(default_factory=dict)

    def part(self, section: str, name: str, measure: Callable[[], Any], needs_s: float = PART_S) -> Any:
        """Do a part, unless less time is left than it needs; note its result, or its error."""
        left = self.until - time.monotonic()
        started = time.monotonic()
        if left < needs_s:
            result: Any = {"skipped": f"{left:.0f} s were left"}
        else:
            try:
                result = measure()
            except Exception as error:  # noqa: BLE001 (the other parts go on)
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}"[:500], "ok": False}
        if isinstance(result, dict):
            result["part took s"] = round(time.monotonic() - started, 1)
        self.content.setdefault(section, {})[name] = result
        self.file.write_text(json.dumps(self.content, indent=1) + "\n")
        print(f"{section}: {name}: {json.dumps(result)[:300]}", flush=True)
        return result


def predicted_gib(case: Case) -> float:
    """Return the prediction for a case."""
    found = predicted(
        BASES[case.base], working_precision(case.precision), cached=case.cached, mixed_precision=case.precision,
        train_batch_size=case.batch_size, gradient_checkpointing=case.gradient_checkpointing,
        on_gpu=True,
    )  # fmt: skip
    return found.total(case.batch_size) / GIB


def measured(case: Case, prediction: Future[float]) -> dict[str, Any]:
    found = speed.memory(
        BASES[case.base], case.precision, case.batch_size, cached=case.cached,
        gradient_checkpointing=case.gradient_checkpointing,
    )  # fmt: skip
    expected = prediction.result()
    ratio = found.allocated / expected
    return {**found._asdict(), "predicted": expected, "ratio": ratio, "ok": abs(ratio - 1) <= 0.1}


def device_facts(device: torch.device) -> dict[str, Any]:
    import accelerate
    import diffusers
    import transformers

    modules = (torch, diffusers, transformers, accelerate)
    facts: dict[str, Any] = {module.__name__: module.__version__ for module in modules}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {"device": found.name, "GiB": found.total_memory / 2**30, "cudnn": torch.backends.cudnn.version()}
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--updates", type=int, default=20, help="of a block")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(args.out / "kit.json", time.monotonic() + 60 * args.minutes)
    report.part("machine", "facts", lambda: device_facts(device))
    checks = all_checks(device)
    if device.type == "cpu":
        results = [report.part("checks", name, check) for name, check in checks.items()]
        return int(not all(result.get("ok") for result in results))
    on_gpu(report, checks, args.updates)
    judged = [result for section in ("checks", "memory") for result in report.content[section].values()]
    return int(not all(result.get("ok") for result in judged))


def on_gpu(report: Report, checks: dict[str, Callable[[], Any]], updates: int) -> None:
    """Do the parts that need a GPU, those first that matter most.

    Args:
        updates: of a block.
    """
    until = report.until - PART_S

    def rate(name: str, base: Base, size: int, needs_s: float = PART_S, **changes: Any) -> None:
        part = partial(speed.ours, base, size, updates, until, **changes)
        title = f"SD {'1.5' if base is SD15 else '2.1'}, batch {size}"
        report.part("speed", ", ".join(filter(None, [title, name])), part, needs_s)

    compiled = checks.pop("compiled")
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        predictions = {case: pool.submit(predicted_gib, case) for case in CASES}
        for name, check in checks.items():
            report.part("checks", name, check)
        for size in BATCHES:
            rate("", SD15, size)
        rate("", SD21, BATCHES[0])
        for case in CASES:
            report.part("memory", " ".join(map(str, case)), partial(measured, case, predictions[case]))
    report.part("checks", "compiled", compiled, COMPILING_S)
    for size in (BATCHES[0], BATCHES[-1], *BATCHES[1:-1]):
        loop = partial(speed.reference, SD15, size, updates // 2, until)
        report.part("reference loop", f"SD 1.5, batch {size}", loop)
    report.part("profile", f"SD 1.5, batch {BATCHES[0]}", partial(speed.profile, SD15, BATCHES[0]))
    report.part("checkpoint", "SD 1.5: copy in host memory", partial(speed.checkpoint_copy, SD15))
    for size in BATCHES[1:]:
        rate("", SD21, size)
    for size in (BATCHES[0], BATCHES[-1]):
        rate("without graphs", SD15, size, cuda_graphs="off")
        rate("PyTorch's layers", SD15, size, fused=False)
    if find_spec("bitsandbytes"):
        rate("8-bit Adam", SD15, BATCHES[-1], use_8bit_adam=True)
    for size in (BATCHES[-1], BATCHES[0]):
        rate("compiled", SD15, size, COMPILED_SPEED_S, compile=True)


if __name__ == "__main__":
    raise SystemExit(main())
