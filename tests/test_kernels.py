"""The fused layers' kernels themselves, where Triton is installed: in its interpreter, and compiled for several GPUs.

Neither needs a GPU. The tests of tests/gpu run them on one.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from full_size import SD15, SD21, SDXL
from kernel_calls import Variant, launches_noted
from predictions import predicted

triton = pytest.importorskip("triton")

CAPABILITIES = 80, 90, 120
"""Compute capabilities, times 10: of the A100 (8.6 and 8.9 have its instructions), the H100, the RTX 5090."""


def test_in_the_interpreter_they_compute_what_pytorchs_layers_do(tiny_base: Path, circles: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpreted_kernels.py"), tiny_base, circles],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert set(found["trials"].values()) == {None}
    for case, off in found["differences"].items():
        assert off < (3e-2 if "autocast" in case else 1e-5), case
    assert len(found["differences"]) == 20
    assert found["fused"] == pytest.approx(found["plain"], rel=2e-2)
    assert found["fused"] != found["plain"], "other arithmetic ran"


@pytest.fixture(scope="module")
def variants() -> set[Variant]:
    """Return what is compiled for the published base models in all precisions."""
    found: set[Variant] = set()
    with launches_noted(lambda kernel, arguments: found.add(Variant.of(kernel, arguments)), batch_size=48):
        for base in (SD15, SD21, SDXL):
            for dtype, precision in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "no")):
                predicted(base, dtype, on_gpu=True, mixed_precision=precision)
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_they_compile_for_each_kind_of_gpu_and_keep_their_numbers_in_registers(
    capability: int, variants: set[Variant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert len(variants) > 80
    for variant in variants:
        used = resources(compiled(variant, capability), tmp_path / "kernel.cubin")
        assert used["STACK"] + used["LOCAL"] <= 16, f"numbers of {variant} are in memory: {used}"
        assert used["REG"] <= 128, f"{variant} leaves no room for other programs: {used}"
        assert used["SHARED"] <= 16 << 10, f"{variant} leaves no room for other programs: {used}"


def compiled(variant: Variant, capability: int) -> bytes:
    """Compile a kernel for a GPU that need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = variant.name.partition(".")
    function = getattr(importlib.import_module(f"raycontrolnet.model.fused.{module}"), name)
    index = {name: (place,) for place, name in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        dict(variant.types),
        {index[name]: value for name, value in variant.constants},
        {index[name]: [["tt.divisibility", 16]] for name in variant.divisible},
    )
    cubin: bytes = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
    return cubin


def resources(cubin: bytes, file: Path) -> dict[str, int]:
    """Return registers a thread, and bytes of stack, shared and local memory of a compiled kernel."""
    file.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
    words: list[Any] = [word.split(":") for word in done.stdout.split() if word.count(":") == 1]
    return {name: int(value) for name, value in words if value.isdigit()}
