"""Fixtures of all tests: tiny base models and data, written once a session; no network unless asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

# A shell ignores Ctrl-C for what it starts with `&`, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Nothing of what is tested goes into the caches of who runs the tests.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="raycontrolnet-tests-")
# Before anything imports torch: threads that share a tiny tensor wait for each other, on a busy machine for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from raycontrolnet.demo.shapes import write_shapes

if TYPE_CHECKING:
    from runs import Run

    from raycontrolnet.data.records import PreparedRow

TINY_RESOLUTION = 32
"""Pixels; 4 x 4 latents, 2 x 2 in the middle of the tiny UNet."""


@pytest.fixture(autouse=True)
def _network_only_if_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests marked `network` reach the Hub; the others, and their subprocesses, stay offline."""
    if request.node.get_closest_marker("network"):
        import datasets
        import huggingface_hub.constants

        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def _local_ray() -> None:
    """Start one Ray for the whole session, at the first test that needs it: two CPUs for workers, one for loading."""
    import ray
    from processes import start_ray

    if not ray.is_initialized():
        start_ray()


@pytest.fixture(scope="session", autouse=True)
def _ray_ends_with_the_session() -> Iterator[None]:
    yield
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture
def bootstrap_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the path of a cluster's settings, by which a process runs as Ray's autoscaler does; nothing is there."""
    from raycontrolnet.cluster import nodes

    file = tmp_path / "ray_bootstrap_config.yaml"
    monkeypatch.setattr(nodes, "BOOTSTRAP_CONFIG", file)
    monkeypatch.delenv(nodes.KUBERAY_VARIABLE, raising=False)
    command = [sys.executable, "-c", "print(flush=True); input()", f"{nodes.BOOTSTRAP_FLAG}{file}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as autoscaler:
        assert autoscaler.stdout
        autoscaler.stdout.readline()  # a process that has only just begun has no command line yet
        yield file
        autoscaler.kill()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a Stable Diffusion of a few thousand random weights that predicts the noise."""
    from base_model import write_random_base

    return write_random_base(tmp_path_factory.mktemp("tiny_base"), "tiny")


@pytest.fixture(scope="session")
def tiny_base_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the same with prediction_type v_prediction."""
    from base_model import write_random_base

    return write_random_base(tmp_path_factory.mktemp("tiny_base_v"), "tiny", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def tiny_xl_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a Stable Diffusion XL of a few thousand random weights that predicts the noise."""
    from base_model import write_random_xl_base

    return write_random_xl_base(tmp_path_factory.mktemp("tiny_xl_base"))


@pytest.fixture(scope="session")
def circles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 rows, so that epochs end within a batch. Do not write into it."""
    return write_shapes(tmp_path_factory.mktemp("circles"), 13, resolution=TINY_RESOLUTION)


@pytest.fixture(scope="session")
def run_settings(tiny_base: Path, circles: Path) -> dict[str, Any]:
    """Return the settings of a run of four updates in this process, without its output_dir."""
    return {
        "pretrained_model_name_or_path": str(tiny_base),
        "train_data_dir": str(circles),
        "resolution": TINY_RESOLUTION,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "learning_rate": 1e-3,
        "seed": 0,
        "report_to": "none",
        "cache_latents": "off",
        "num_workers": "0",
        "use_gpu": False,
    }


@pytest.fixture
def tiny_settings(run_settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return the settings of a run of four updates in this process: `TrainConfig(**tiny_settings)`."""
    return run_settings | {"output_dir": str(tmp_path / "out")}


@pytest.fixture(scope="session")
def validated_settings(run_settings: dict[str, Any], circles: Path) -> dict[str, Any]:
    """Return `run_settings` with two pairs of prompt and control image, validated and scored every second update."""
    return run_settings | {
        "lr_warmup_steps": 0,
        "seed": 7,
        "validation_prompt": ("red circle", "blue circle"),
        "validation_image": tuple(str(circles / "conditioning" / f"0000{index}.png") for index in range(2)),
        "num_validation_images": 2,
        "validation_steps": 2,
        "control_fidelity": "shape",
        "report_to": "tensorboard",
    }


@pytest.fixture(scope="session")
def validated_run(validated_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train with `validated_settings`. Do not write into its folder."""
    from runs import train

    return train(validated_settings | {"output_dir": str(tmp_path_factory.mktemp("validated") / "run")})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[PreparedRow]]:
    """Record the batches that the step gets, in order."""
    from raycontrolnet.model import batch as batch_module
    from raycontrolnet.training import step_inputs

    batches: list[list[PreparedRow]] = []
    make_batch = batch_module.make_batch

    def recording(rows: list[PreparedRow], *rest: Any) -> Any:
        batches.append(rows)
        return make_batch(rows, *rest)

    monkeypatch.setattr(step_inputs, "make_batch", recording)
    return batches


@pytest.fixture(scope="session")
def sweep_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 24 rows: enough to hold some out. Do not write into it."""
    return write_shapes(tmp_path_factory.mktemp("rows"), 24, resolution=TINY_RESOLUTION)


@pytest.fixture
def sweep_settings(tiny_settings: dict[str, Any], sweep_rows: Path, tmp_path: Path) -> dict[str, Any]:
    """Return the settings of a trial of 8 updates, with a measurement and a checkpoint every 2; one cache for all."""
    return tiny_settings | {
        "train_data_dir": str(sweep_rows),
        "output_dir": str(tmp_path / "sweep"),
        "max_train_steps": 8,
        "validation_steps": 2,
        "validation_split": 4,
        "checkpointing_steps": 2,
        "lr_warmup_steps": 0,
        "num_workers": "1",
        "cache_latents": "auto",
        "latents_cache_dir": str(sweep_rows.with_name("sweep_latents")),
    }
