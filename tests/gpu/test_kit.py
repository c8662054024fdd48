"""The GPU kit's checks: on a GPU, and on the CPU as far as it has them; the kit needs few packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import checks
import pytest
import torch
from correctness import CPU, NOTICES, update
from full_size import TINY
from states import components_of, settings, training

HERE = Path(__file__).parent
WITHOUT = """
import runpy, sys
for name in ("ray", "datasets", "tyro", "pyarrow", "pandas", "cv2", "matplotlib", "tensorboard", "grpc"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kit(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the kit where only packages are installed that torch, diffusers, transformers and accelerate need."""
    places = [*(str(path) for path in (HERE, HERE.parent)), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-c", WITHOUT, str(HERE / "kit.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_it_needs_few_packages() -> None:
    found = kit("--help")
    assert found.returncode == 0, found.stderr
    assert "OUT/kit.json is written" in found.stdout


def test_an_update_as_a_worker_does_it() -> None:
    """On the CPU; on a GPU the kit lets it fail where it waits."""
    config = settings()
    with training(components_of(TINY, config, CPU, cached=False), config) as state:
        assert [update(state, number, CPU).read() for number in range(2)] == [NOTICES] * 2
        assert state.step == 2


@pytest.mark.slow
def test_the_checks_pass_on_the_cpu(tmp_path: Path) -> None:
    found = kit(str(tmp_path / "out"))
    assert found.returncode == 0, found.stderr
    report = json.loads((tmp_path / "out" / "kit.json").read_text())
    assert len(report["checks"]) == 4
    assert all(check["ok"] for check in report["checks"].values())
    assert report["checks"]["bf16 gradients"]["gradients off by"] > 1e-4, "it compares something"
    again = kit(str(tmp_path / "none"), "--minutes", "0.1")
    assert again.returncode == 1
    report = json.loads((tmp_path / "none" / "kit.json").read_text())
    assert all("skipped" in check for check in report["checks"].values())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's compiler
@pytest.mark.parametrize("name", sorted(checks.NAMES))
def test_checks(name: str) -> None:
    check = checks.checks(torch.device("cuda")).get(name)
    if check is None:
        pytest.skip("needs bitsandbytes")
    found = check()
    assert found["ok"], found
