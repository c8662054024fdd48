"""The needs of a run, predicted on shapes: the counts are those of a real step, and the figures that were measured."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from full_size import SD15, TINY, write_configurations
from predictions import predicted
from reference import CPU
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import raycontrolnet
from raycontrolnet import TrainConfig, cli, fit
from raycontrolnet.config.check_config import CheckConfig
from raycontrolnet.config.objective_settings import PLAIN
from raycontrolnet.errors import ConfigError
from raycontrolnet.launch import checked_device
from raycontrolnet.launch.check import _device_lines, _memory_lines, _rows_to_encode, check
from raycontrolnet.launch.checked_device import Device
from raycontrolnet.launch.needs import Needs, memory_size
from raycontrolnet.model.components import Components, load_components
from raycontrolnet.model.families.registry import family_of
from raycontrolnet.model.files import local_files
from raycontrolnet.predict.count import StepCost, _counter, count_steps
from raycontrolnet.predict.devices import PYTHON_S_PER_CALL, peak_of
from raycontrolnet.predict.prediction import GAPS, GIB, LEAST_RESERVED, RESERVED, Prediction, _use_layers_of_gpus
from raycontrolnet.predict.shape_tensors import ShapeMode
from raycontrolnet.predict.shapes import _models, shaped
from raycontrolnet.storage.checkpoint import Checkpoint

BUDGET = 6_300
"""Calls of operators in a step of SD 1.5: 6,223 when they were first counted so, without asking for devices."""
BUDGET_ON_GPUS = 6_600
"""The same of its layers on a GPU, most of whose kernels are none of PyTorch's operators: 6,516."""
DEFAULT_SHAPES = [(False, True, torch.float32), (True, False, torch.bfloat16), (True, True, torch.bfloat16)]
"""Layers of a GPU, gradient checkpointing and dtype, of the cases that the default tests compare."""
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
"""Fused attention on CPUs, for torch's counter."""


def count_step(components: Components, batch_size: int, resolution: int, *, cached: bool) -> StepCost:
    """Count a step of one batch alone, on real models too."""
    return _counter(components, batch_size, resolution, PLAIN, cached=cached).of(batch_size)


@pytest.fixture
def sd15(tmp_path: Path) -> Path:
    return write_configurations(SD15, tmp_path / "base")


def test_the_figures_that_were_measured(sd15: Path) -> None:
    """SD 1.5 at 512 px in bf16 from the cache: GiB beside CUDA's context, on an H100."""
    found = predicted(sd15, torch.bfloat16)
    for batch_size, measured in ((4, 11.7), (32, 39.7), (64, 71.8)):
        assert found.total(batch_size) / GIB == pytest.approx(measured, rel=0.02)
    assert round(found.weights["denoiser"] / 1e6) == 860
    assert round(found.weights["ControlNet"] / 1e6) == 361
    assert found.flop_per_sample / 1e12 == pytest.approx(2.34, rel=0.01)
    assert found.encoding_flop / 1e12 == pytest.approx(1.12, rel=0.01)
    assert found.dispatches <= BUDGET


def test_the_layers_of_a_gpu(sd15: Path) -> None:
    """The same work in less memory; the guide shows what a GPU needs."""
    plain = predicted(sd15, torch.bfloat16, mixed_precision="bf16")
    compiled = predicted(sd15, torch.bfloat16, on_gpu=True, compile=True, mixed_precision="bf16")
    assert compiled == plain, "which PyTorch fuses itself"
    found = predicted(sd15, torch.bfloat16, on_gpu=True, mixed_precision="bf16")
    assert found.flop_per_sample == plain.flop_per_sample
    assert 0.7 < found.activations_per_sample / plain.activations_per_sample < 0.8
    assert found.dispatches <= BUDGET_ON_GPUS
    measured = 4 / 20.2  # seconds of a step of batch 4 without graphs, tests/benchmarks/RESULTS.md
    assert found.dispatches * PYTHON_S_PER_CALL == pytest.approx(measured, rel=0.05)
    guide = (Path(__file__).parents[1] / "examples" / "guides" / "needs.md").read_text()
    needs = Needs(TrainConfig(pretrained_model_name_or_path="none", train_data_dir="."), found, lambda **_: found)
    shown = [*_memory_lines(found, 4, "a GPU", on_gpu=True), *_device_lines(needs, Device(None, 24 * GIB, None))]
    assert [line for line in shown if line.strip() not in guide] == []


def figures(lines: list[str]) -> dict[str, float]:
    """Return the GiB of each line of `_memory_lines`; for activations the fixed part and that of a sample, too."""
    sizes = {"GiB": 1.0, "MiB": 1 / 1024}
    found = {}
    for line in lines:
        name, *numbers = line[:15].strip(), *re.findall(r"([\d.]+) (GiB|MiB)", line[15:])
        for part, (number, unit) in zip(("", " base", " each"), numbers, strict=False):
            found[name + part] = float(number) * sizes[unit]
    return found


@pytest.mark.parametrize("averages", [False, True])
def test_the_lines_add_up_for_any_batch(averages: bool, sd15: Path) -> None:
    found = predicted(sd15, torch.bfloat16, on_gpu=True, mixed_precision="bf16", use_ema=averages)
    four, ten = (figures(list(_memory_lines(found, batch, "a GPU", on_gpu=True))) for batch in (4, 10))
    assert "update" in four if averages else "update" not in four
    parts = [
        name for name in four if name not in ("together", "together base") and not name.endswith((" base", " each"))
    ]
    assert four["together"] == pytest.approx(sum(four[name] for name in parts), abs=0.4)  # of ten rounded figures
    fixed = four["together"] - four["activations"] - four["graph inputs"]
    of_ten = four["activations base"] + 10 * (four["activations each"] + four["graph inputs base"])
    assert ten["together"] == pytest.approx(fixed + of_ten, abs=0.2)
    assert four["activations base"] > 0.3, "else nobody would miss it"


def test_graphs_keep_the_inputs_of_each_size(sd15: Path) -> None:
    """A row's latents and noises, its control image, its prompt's tokens and their states, and its timestep."""
    settings: dict[str, Any] = {"on_gpu": True, "mixed_precision": "bf16"}
    one = predicted(sd15, torch.bfloat16, **settings)
    of_size = 512 * 512 * 3 + 2 * 4 * 64 * 64 * 2 + 2 * 4 * 64 * 64 * 4
    of_prompt = 77 * 8 + 77 * 768 * 2 + 8
    assert one.graph_inputs_per_sample == of_size + of_prompt
    sizes = ((512, 512), (1024, 256))
    two = predicted(sd15, torch.bfloat16, sizes=sizes, **settings)
    assert two.graph_inputs_per_sample == 2 * (of_size + of_prompt)
    assert two == replace(one, graph_inputs_per_sample=two.graph_inputs_per_sample)
    assert two.total(8) - one.total(8) == 8 * one.graph_inputs_per_sample
    assert predicted(sd15, torch.bfloat16, sizes=sizes, cuda_graphs="off", **settings) == two.without_graphs()
    pixels = predicted(sd15, torch.bfloat16, cached=False, **settings)
    assert pixels.graph_inputs_per_sample == one.graph_inputs_per_sample + 512 * 512 * 3 - 2 * 4 * 64 * 64 * 2


@pytest.fixture
def real(tiny_settings: dict[str, Any]) -> Components:
    return load_components(TrainConfig(**tiny_settings), device=CPU, dtype=torch.float32, seed=0)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_real_step_has_the_same_counts(cached: bool, checkpointing: bool, real: Components, tiny_base: Path) -> None:
    """The same bytes and operations; torch's own counter finds the same operations."""
    settings: dict[str, Any] = {"resolution": 32, "gradient_checkpointing": checkpointing, "train_batch_size": 3}
    found = predicted(tiny_base, torch.float32, cached=cached, **settings)
    if checkpointing:
        real.denoiser.enable_gradient_checkpointing()
        real.controlnet.enable_gradient_checkpointing()
    counted = count_step(real, 3, 32, cached=cached)
    assert counted.flop == 3 * found.flop_per_sample
    assert counted.activations == found.activations(3)
    if not cached:  # whose encoding comes before the step
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as flop:
            count_step(real, 3, 32, cached=False)
        assert flop.get_total_flops() == counted.flop


@pytest.mark.parametrize(
    ("on_gpu", "checkpointing", "dtype"),
    [
        pytest.param(*case, marks=() if case in DEFAULT_SHAPES else pytest.mark.slow)
        for case in product((False, True), (False, True), (torch.bfloat16, torch.float32))
    ],
)
def test_shapes_are_those_of_torchs_own_mode(
    on_gpu: bool, checkpointing: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Counted once for all batches, and under torch's FakeTensorMode for each: the same bytes and operations."""
    files = local_files(write_configurations(TINY, tmp_path / "base"))
    config = TrainConfig(pretrained_model_name_or_path="none", train_data_dir=".")
    family = family_of(files.read_json("unet/config.json"))
    assert family

    def checkpointed(components: Components) -> Components:
        if checkpointing:
            components.denoiser.enable_gradient_checkpointing()
            components.controlnet.enable_gradient_checkpointing()
        if on_gpu:
            _use_layers_of_gpus(components)
        return components

    sizes = (1, 3, 70)
    with shaped(family, files, config, vae=None, dtype=dtype) as components:
        found = count_steps(checkpointed(components), sizes, 64, cached=True)
        alone = count_step(components, 3, 64, cached=True)  # which diffusers does not copy before it doubles its size
        assert replace(alone, dispatches=0) == replace(found[1], dispatches=0)
        scheduler = components.noise_scheduler
    with FakeTensorMode(allow_non_fake_inputs=True):
        components = checkpointed(_models(family, files, config, scheduler, vae=None, dtype=dtype))
        fake = [count_step(components, size, 64, cached=True) for size in sizes]
    assert [(each.flop, each.activations) for each in found] == [(each.flop, each.activations) for each in fake]
    assert found[0].activations < found[1].activations < found[2].activations


def test_a_shape_outside_of_its_mode() -> None:
    with ShapeMode():
        one = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match="without data was used outside of its mode"):
        one + 1


def test_precision_and_optimizer(tiny_base: Path) -> None:
    half, plain = (predicted(tiny_base, dtype, resolution=64) for dtype in (torch.bfloat16, torch.float32))
    assert plain.frozen_bytes["denoiser"] == 2 * half.frozen_bytes["denoiser"]
    assert "VAE" not in half.frozen_bytes
    pixels = predicted(tiny_base, torch.bfloat16, cached=False, resolution=64)
    assert pixels.flop_per_sample - half.flop_per_sample == half.encoding_flop == plain.encoding_flop > 0
    assert plain.activations_per_sample > 1.3 * half.activations_per_sample
    assert half.trained_bytes["optimizer"] == 4 * half.with_8bit_adam().trained_bytes["optimizer"]
    assert half.total(3) - half.with_8bit_adam().total(3) == 6 * half.weights["ControlNet"]


@pytest.mark.parametrize(
    ("averages", "copies", "graphs"),
    [(False, False, False), (True, False, False), (True, True, True), (False, True, True), (False, True, False)],
)
def test_the_largest_batch_fits_and_no_larger(averages: bool, copies: bool, graphs: bool) -> None:
    found = Prediction(
        weights={"ControlNet": 10**8}, trained=10**8, frozen_bytes={"denoiser": 10**9}, moment_bytes=8,
        activations_base=1e6, activations_per_sample=1e9, flop_per_sample=1, dispatches=1, latents=1,
        has_averages=averages, optimizer_copies=copies, has_graphs=graphs, graph_inputs_per_sample=10**8 * graphs,
    )  # fmt: skip
    assert found.total(2) == found._fixed + 2.001e9 + (2e8 + 4e8 if graphs else 0)  # a copy, beside
    for device in (8 * GIB, 24 * GIB, 80 * GIB):
        largest = found.largest_batch(device)
        assert found.fits(largest, device, RESERVED)
        assert not found.fits(largest + 1, device, RESERVED)
    assert found.largest_batch(3 * GIB) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_files_dtype_does_not_matter(dtype: torch.dtype, tiny_xl_base: Path, tmp_path: Path) -> None:
    """The published text encoders' configurations have one, which differs from that of the run."""
    base = Path(shutil.copytree(tiny_xl_base, tmp_path / "base"))
    for name in ("text_encoder", "text_encoder_2"):
        file = base / name / "config.json"
        config = json.loads(file.read_text())
        config.pop("dtype", None)
        file.write_text(json.dumps(config | {"torch_dtype": "float16"}))
    found = predicted(base, dtype, resolution=32)
    assert found.frozen_bytes["text encoder"] == found.weights["text encoder"] * dtype.itemsize
    assert found.frozen_bytes["denoiser"] == found.weights["denoiser"] * dtype.itemsize


@pytest.mark.parametrize(
    ("name", "half"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362), ("NVIDIA L4", 121),
     ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA H100 NVL", 835), ("NVIDIA A10G", 70),
     ("NVIDIA GeForce RTX 4090", 165), ("Tesla T4", 65)],
)  # fmt: skip
def test_peaks(name: str, half: float) -> None:
    assert (peak := peak_of(name))
    assert peak.of(torch.bfloat16, allow_tf32=False) == half
    assert peak.of(torch.float32, allow_tf32=False) < half


@pytest.mark.parametrize(
    "name", ["a device of tomorrow", "NVIDIA RTX A1000", "NVIDIA RTX A4000", "NVIDIA T400 4GB",
             "NVIDIA GeForce RTX 4090 Laptop GPU"],
)  # fmt: skip
def test_other_devices_are_not_taken_for_these(name: str) -> None:
    assert peak_of(name) is None


def checked(settings: dict[str, Any], **own: Any) -> list[str]:
    stream = io.StringIO()
    check(CheckConfig(train=TrainConfig(**settings), **own), stream=stream)
    return stream.getvalue().splitlines()


def test_what_it_says(tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"train_batch_size": 2, "max_train_steps": 30, "checkpointing_steps": 10, "checkpoints_total_limit": 2}
    said = checked(
        tiny_settings | run | {"cache_latents": "on", "num_workers": "2"},
        device_memory=24, device_tflops=1e-3, price_per_hour=3.6,
    )  # fmt: skip
    assert said[0] == (
        "Stable Diffusion 1.x and 2.x, 32 px, fp32, from cached latents: 2 workers x batch 2 x accumulation 1"
    )
    assert any(line.startswith("  VAE ") and "on the CPU" in line for line in said)
    text = "\n".join(said)
    assert "encoding: 13 images of " in text
    assert "device: fits; the largest batch for 0.5 of the machine with 12.0 GiB is " in text
    assert re.search(r"work: 30 updates, 120 samples of 0\.\d*[1-9]\d* GFLOP each", text)
    assert re.search(r"  together +(0\.[1-9]|[1-9]\d*\.\d) MiB ", text), "no zeros for small models"
    assert "cost: " in text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = checked(tiny_settings | run, price_per_hour=3.6)
    assert "encoding: " not in "\n".join(said), "from pixels"
    assert "time and cost: not known without the device; --device_tflops" in "\n".join(said)
    assert "disk: 2 checkpoints of " in text
    assert "cache: 256 B of latents a row, " in text
    both = "\n".join(checked(tiny_settings | run | {"cache_latents": "on", "random_flip": True}))
    assert "cache: 512 B of latents a row (both ways, for --random_flip), " in both
    assert "encoding: 26 images (both ways, for --random_flip) of " in both


def test_rows_that_are_encoded_first() -> None:
    """Held-out rows, too; none for a run that goes on with its cache."""
    train = TrainConfig(pretrained_model_name_or_path="base", train_data_dir="data", validation_split=16)
    some = replace(train, max_train_samples=100)
    pixels, cached = (Checkpoint(Path("checkpoint-1"), 1, 4, 0, "run", {"cached": cached}) for cached in (False, True))
    assert [_rows_to_encode(each, 1000, None) for each in (train, some)] == [1000, 116]
    assert [_rows_to_encode(train, 1000, start) for start in (pixels, cached)] == [1000, 0]


CPU_OF_24 = "the CPU (--use_gpu False), of a machine of 24.0 GiB"


@pytest.mark.parametrize(
    ("settings", "own", "here", "expected", "dtype"),
    [
        ({}, {}, False, "the CPU, as there is no GPU here; --device_memory 24 counts for a GPU of 24 GiB", "fp32"),
        ({}, {"device_memory": 24}, False, "a GPU of 24.0 GiB (--device_memory)", "bf16"),
        ({}, {"device_tflops": 312}, False, "a GPU of 312 TFLOP/s (--device_tflops)", "bf16"),
        ({"use_gpu": True}, {}, False, "a GPU (--use_gpu True); there is none here", "bf16"),
        ({"use_gpu": False}, {"device_memory": 24}, False, CPU_OF_24, "fp32"),
        ({"use_gpu": False}, {}, True, "the CPU (--use_gpu False)", "fp32"),
        ({}, {}, True, "the GPU here, NVIDIA A100", "bf16"),
        ({}, {"device_memory": 24}, True, "a GPU of 24.0 GiB (--device_memory)", "bf16"),
    ],
)
def test_it_says_which_device_it_counts_for(
    tiny_settings: dict[str, Any], settings: dict[str, Any], own: dict[str, Any], here: bool, expected: str,
    dtype: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gpu = SimpleNamespace(name="NVIDIA A100", total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(checked_device, "has_bf16", lambda: True)
    said = checked({**tiny_settings, "use_gpu": None, **settings}, **own)
    assert f", {dtype}, from pixels: " in said[0]
    (line,) = (line for line in said if line.startswith("memory of a worker, "))
    assert line == f"memory of a worker, counted for {expected}"
    (together,) = (line for line in said if line.startswith("  together "))
    assert ("CUDA" in together) == (dtype == "bf16")
    (found,) = (line for line in said if line.startswith("device: "))
    assert ("NVIDIA" in found) == ("NVIDIA" in expected)
    assert "CUDA" not in found or dtype == "bf16"


def test_what_needs_a_gpu_is_refused_for_the_cpu(tiny_settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^--mixed_precision=fp16: needs a GPU; "):
        checked(tiny_settings | {"mixed_precision": "fp16", "use_gpu": False})


def test_what_brings_a_run_that_does_not_fit_there(tiny_settings: dict[str, Any]) -> None:
    train = TrainConfig(**tiny_settings | {"train_batch_size": 512, "cache_latents": "on"})
    base = Path(train.pretrained_model_name_or_path)
    plain, less = (
        predicted(base, torch.float32, resolution=32, gradient_checkpointing=on, train_batch_size=512)
        for on in (False, True)
    )
    for needed, expected in (
        (
            (plain.total(512) + less.total(512)) / 2,
            f"--gradient_checkpointing brings it to {memory_size(less.total(512))}",
        ),
        (less.total(512) / 2, "--train_batch_size 128 --gradient_accumulation_steps 4 fits"),
        (
            -LEAST_RESERVED / 2,
            "no batch fits with --use_8bit_adam --gradient_checkpointing: take a smaller --resolutio",
        ),
    ):
        device = (needed + LEAST_RESERVED) / (1 - GAPS)
        assert not plain.fits(512, device)
        assert Needs(train, plain, lambda **_: less).advice(device).startswith(expected)
    said = checked(tiny_settings | {"use_gpu": None, "train_batch_size": 512}, device_memory=0.9)
    (found,) = (line for line in said if line.startswith("device: "))
    assert found.startswith("device: batch 512 needs ")
    assert "the device has 0.9 GiB: no batch fits with --use_8bit_adam" in found


def test_graphs_are_left_out_where_that_makes_it_fit(tiny_base: Path) -> None:
    """They hold the activations while averages are updated with a copy."""
    settings: dict[str, Any] = {"train_batch_size": 64, "mixed_precision": "bf16", "use_ema": True, "resolution": 32}
    train = TrainConfig(pretrained_model_name_or_path="none", train_data_dir=".", **settings)
    plain = predicted(tiny_base, torch.bfloat16, on_gpu=True, **settings)
    less = predicted(tiny_base, torch.bfloat16, on_gpu=True, gradient_checkpointing=True, **settings)
    needs = Needs(train, plain, lambda **_: less)

    def advice(between: tuple[float, float]) -> str:
        return needs.advice((sum(between) / 2 + LEAST_RESERVED) / (1 - GAPS))

    bare, bare_less = plain.without_graphs().total(64), less.without_graphs().total(64)
    assert bare_less < less.total(64) < bare < plain.total(64)
    assert advice((bare, plain.total(64))) == f"--cuda_graphs off brings it to {memory_size(bare)}"
    assert advice((less.total(64), bare)) == f"--gradient_checkpointing brings it to {memory_size(less.total(64))}"
    assert advice((bare_less, less.total(64))) == (
        f"--gradient_checkpointing --cuda_graphs off brings it to {memory_size(bare_less)}"
    )
    without = replace(needs, prediction=plain.without_graphs(), counted=lambda **_: less.without_graphs())
    assert "--cuda_graphs off" not in without.advice(LEAST_RESERVED)
    small = replace(needs, train=replace(train, use_8bit_adam=True))
    one = less.without_graphs().total(1)
    device = (one + less.total(1) + 2 * LEAST_RESERVED) / 2 / (1 - GAPS)
    assert re.fullmatch(
        r"--train_batch_size \d+ --gradient_accumulation_steps \d+ "
        r"fits with --gradient_checkpointing --cuda_graphs off",
        small.advice(device),
    )


def test_a_run_that_goes_on_without_graphs_is_not_refused(tiny_base: Path) -> None:
    settings: dict[str, Any] = {"mixed_precision": "bf16", "use_ema": True, "resolution": 32}
    plain = predicted(tiny_base, torch.bfloat16, on_gpu=True, **settings)
    needs = Needs(
        TrainConfig(pretrained_model_name_or_path="none", train_data_dir=".", **settings), plain, lambda **_: plain
    )
    size = needs.train.train_batch_size
    bare = plain.without_graphs().total(size)
    assert plain.cannot_fit(size, bare * 0.95)
    assert needs.problem(bare * 0.95) is None
    assert needs.problem(bare * 0.85)


def test_the_cpus_memory(tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine here may swap, so that a warning is all; one that is described must hold the run."""
    settings = tiny_settings | {"use_gpu": None, "num_workers": "2"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def device(of_machine: float, **changed: Any) -> str:
        monkeypatch.setattr("raycontrolnet.launch.worker_memory.host_bytes", lambda: of_machine)
        (line,) = (line for line in checked(settings | changed) if line.startswith("device: "))
        return line

    here = "0.5 of this machine with 24.0 GiB"
    assert re.fullmatch(
        rf"device: fits; the largest batch for {here} is [1-9]\d*, as 2.7 GiB are kept for Python and gaps",
        device(48 * GIB),
    )
    assert re.search(rf"and what Python needs; {here[:-8]}2.0 GiB may just have it; to be sure, ", device(4 * GIB))
    warning = r"device: warning: the run may be killed, or swap: batch 4 needs [\d.]+ MiB"
    for size, more in ((1.0, " and 0.5 GiB for Python and gaps, 0.5 of this machine has 0.5 GiB: "), (0, ", 0.5 of ")):
        assert re.match(warning + more, found := device(size * GIB))
        assert "8bit" not in found, "which the CPU does not have"
    given = settings | {"use_gpu": False}
    (line,) = (line for line in checked(given, device_memory=48) if line.startswith("device: "))
    assert line.startswith("device: fits; the largest batch for 0.5 of the machine with 24.0 GiB is ")
    with pytest.raises(ConfigError, match=r"^--train_batch_size=4: batch 4 needs .* 0.5 of the machine has "):
        checked(given, device_memory=0.001)
    monkeypatch.setattr(checked_device, "runs_on_a_cluster", lambda _: True)
    instead = "--use_gpu False --device_memory 24 says what fits machines of 24 GiB"
    assert device(0) == f"device: its memory is not known; {instead}"


def test_the_margin_is_said(tiny_settings: dict[str, Any]) -> None:
    tiny_settings = tiny_settings | {"use_gpu": None}
    (said,) = (line for line in checked(tiny_settings, device_memory=24) if line.startswith("device: "))
    assert said.endswith(", as 3.7 GiB are kept for CUDA and gaps"), "3 GiB and 3%"
    (said,) = (line for line in checked(tiny_settings, device_memory=1) if line.startswith("device: "))
    assert " MiB and 1.0 GiB for CUDA and gaps, the device has 1.0 GiB: no batch fits" in said
    assert said.endswith(" (predictions are within 10%: train warns, and tries it)")


def test_what_it_says_goes_to_standard_error_from_python(
    tiny_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """As that of fit, prepare and sweep; the command's output is its result."""
    raycontrolnet.check(raycontrolnet.CheckConfig(train=TrainConfig(**tiny_settings)))
    from_python = capsys.readouterr()
    assert from_python.out == ""
    assert "  together " in from_python.err
    assert cli.main(["check", *(f"--{name}={value}" for name, value in tiny_settings.items())]) == 0
    from_command = capsys.readouterr()
    assert from_command.out == from_python.err
    assert from_command.err == ""


def test_what_may_just_fit(tiny_settings: dict[str, Any]) -> None:
    tiny_settings = tiny_settings | {"use_gpu": None}
    (said,) = (line for line in checked(tiny_settings, device_memory=2.5) if line.startswith("device: "))
    where = "the device with 2.5 GiB"
    assert re.search(
        rf"and what CUDA needs; {where} may just have it; to be sure, the largest batch for {where} is \d+, as", said
    )


def test_what_train_refuses(tiny_settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--size_conditioning=real: Stable Diffusion"):
        checked(tiny_settings | {"size_conditioning": "real"})


def test_bad_input(tiny_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("device_memory", 0.0), ("device_tflops", -1.0), ("price_per_hour", float("inf"))):
        with pytest.raises(ConfigError, match=f"--{name}={value}: must be a number"):
            CheckConfig(train=TrainConfig(**tiny_settings), **{name: value})
    flags = ["--pretrained_model_name_or_path", "nowhere/at/all", "--train_data_dir", "/nothing"]
    assert cli.main(["check", *flags]) == 2
    said = capsys.readouterr().err
    assert "--pretrained_model_name_or_path=nowhere/at/all: " in said
    assert "--train_data_dir=/nothing: " in said
    assert "Traceback" not in said


def test_what_train_would_refuse_comes_after_the_needs(tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    """As `train`: a batch that cannot fit, and a folder with checkpoints. Nothing is written there."""
    stream, new = io.StringIO(), tmp_path / "new"
    with pytest.raises(ConfigError) as refused:
        check(
            CheckConfig(train=TrainConfig(**tiny_settings | {"output_dir": str(new)}), device_memory=1e-4),
            stream=stream,
        )
    (problem,) = refused.value.problems
    assert re.match(r"--train_batch_size=\d+: batch \d+ needs .* MiB, the machine has 0.1 MiB: no batch fits", problem)
    assert "  together " in stream.getvalue()
    assert not new.exists()

    used = tmp_path / "used"
    used.mkdir()
    settings = tiny_settings | {"output_dir": str(used)}
    assert checked(settings)
    assert not list(used.iterdir())
    fit(TrainConfig(**settings | {"num_workers": "0", "max_train_steps": 1}), stream=io.StringIO())
    stream = io.StringIO()
    with pytest.raises(ConfigError, match=r"--output_dir=.*used.*checkpoint-1"):
        check(CheckConfig(train=TrainConfig(**settings)), stream=stream)
    assert "  together " in stream.getvalue()
    assert checked(settings | {"resume_from_checkpoint": "latest"})
    with pytest.raises(ConfigError, match="--resume_from_checkpoint=checkpoint-9: no such folder"):
        checked(settings | {"resume_from_checkpoint": "checkpoint-9"})
