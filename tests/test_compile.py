"""`--compile`: whole graphs, compiled once for a run and for all trials of a process, that learn the same."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bucket_data import write_pictures
from PIL import Image
from reference import write_trained_controlnet
from runs import column, run

from raycontrolnet import TrainConfig
from raycontrolnet.errors import ConfigError, RunError
from raycontrolnet.launch.fit import fit
from raycontrolnet.model import performance
from raycontrolnet.training import held_out


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Trace as on a GPU, without the compiler of machine code; give torch's counts of what it has traced."""
    import torch._dynamo.utils

    monkeypatch.setattr(performance, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    counted: Counter[str] = torch._dynamo.utils.counters["stats"]
    counted.clear()
    yield counted
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def controlnet_folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_controlnet(tiny_base, tmp_path_factory.mktemp("controlnet"))


@pytest.fixture
def settings(validated_settings: dict[str, Any], controlnet_folder: Path) -> dict[str, Any]:
    """Return those of a run that measures five held-out rows, two at a time, and draws, after each second update."""
    changed = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "validation_split": 5, "max_train_steps": 4}
    return validated_settings | changed | {"controlnet_model_name_or_path": str(controlnet_folder)}


def grid(folder: Path) -> Any:
    with Image.open(folder / "validation/step-000004/pair-00-grid.png") as image:
        return np.asarray(image).astype(float)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"mixed_precision": "no"}, marks=pytest.mark.slow),
        {"mixed_precision": "bf16", "gradient_checkpointing": True, "use_ema": True},
    ],
    ids=["fp32", "bf16 with checkpointing and averages"],
)
def test_a_run_learns_the_same(
    settings: dict[str, Any], changed: dict[str, Any], tmp_path: Path, graphs: Counter[str]
) -> None:
    """Two graphs without a break; neither validation nor a second run in the process adds any."""
    plain = run(settings, tmp_path / "plain", **changed)
    assert not graphs
    traced = set[int]()
    for name in ("first", "second"):
        compiled = run(settings, tmp_path / name, compile=True, **changed)
        for figure in ("loss", "grad_norm"):
            np.testing.assert_allclose(column(compiled, figure), column(plain, figure), rtol=1e-5, atol=0)
        for measured, expected in zip(held_out.read(compiled), held_out.read(plain), strict=True):
            assert measured["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
        np.testing.assert_allclose(grid(compiled), grid(plain), rtol=0, atol=3)
        traced.add(graphs["unique_graphs"])
    assert traced == {2}


@pytest.mark.slow
def test_each_size_of_aspect_buckets_is_compiled_once(
    tiny_settings: dict[str, Any], tmp_path: Path, graphs: Counter[str]
) -> None:
    """Two graphs for each of three sizes, over several epochs, and the losses of a run without."""
    data = write_pictures(tmp_path / "data", 12, ((40, 40), (50, 30), (30, 50)))
    settings = tiny_settings | {"train_data_dir": str(data), "aspect_buckets": True, "max_train_steps": 9}
    settings |= {"validation_split": 0, "checkpointing_steps": 9}
    plain = run(settings, tmp_path / "plain")
    shown = io.StringIO()
    folder = fit(
        TrainConfig(**settings | {"compile": True, "output_dir": str(tmp_path / "out")}), stream=shown
    ).output_dir
    np.testing.assert_allclose(column(folder, "loss"), column(plain, "loss"), rtol=1e-5, atol=0)
    assert graphs["unique_graphs"] == 2 * 3
    assert "12 rows in 3 sizes" in shown.getvalue()
    assert "--compile: each size is compiled when its first batch comes" in shown.getvalue()


def test_what_is_not_finite_is_found(
    tiny_settings: dict[str, Any], graphs: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hooks, which compiled models do not call."""
    build = performance.compile_models

    def spoilt(components: Any) -> None:
        build(components)
        with torch.no_grad():
            components.controlnet.conv_in.weight.fill_(torch.nan)

    monkeypatch.setattr("raycontrolnet.training.state.compile_models", spoilt)
    with pytest.raises(RunError, match=r"The first module whose output is not finite: controlnet.conv_in"):
        fit(TrainConfig(**tiny_settings, compile=True))
    assert graphs["unique_graphs"] == 2


def test_xformers_has_graphs_of_its_own(tiny_settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        fit(TrainConfig(**tiny_settings, compile=True, enable_xformers_memory_efficient_attention=True))
    problem = "--compile=True: does not go with --enable_xformers_memory_efficient_attention; leave out one"
    assert problem in error.value.problems
