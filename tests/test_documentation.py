"""README, the guides and the examples are right: their commands run as they stand, their names and files exist.

The blocks of `run` share one Ray and what README's first command made; see documents.py for the kinds of blocks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from documents import BLOCKS, TEXTS, Block, block, run, section, write_data, write_workspace
from hub_stand_in import HubStandIn, take_for_hub

from raycontrolnet import TrainConfig, cli, fit
from raycontrolnet.data.sources import open_source
from raycontrolnet.demo.demo import FOLDER
from raycontrolnet.training import metrics

WEIGHTS = "diffusion_pytorch_model.safetensors"
FIRST, *OTHERS = (found for found in BLOCKS if found.kind == "run")
HERE = ("--num_workers", "0", "--resolution", "64")
SLOW = [found for found in BLOCKS if found.kind == "slow"]

Call = Callable[..., str]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Path]:
    """Enter the reader's folder, in which all tests of this module run."""
    folder = write_workspace(tmp_path_factory.mktemp("reader"), tiny_base)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def trained(workspace: Path) -> Path:
    """`workspace` after README's first training command, in this process."""
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        run_command(FIRST, *HERE)
    assert_first_command(shown.getvalue(), workspace)
    return workspace


def assert_first_command(output: str, workspace: Path) -> None:
    assert "step 1/1 | loss" in output
    assert "done in" in output
    assert steps(workspace / "my-controlnet") == [1]


def run_command(found: Block, *flags: str) -> None:
    """Run a block of one command, with more flags, in this process."""
    assert not set("$|&;<>#`") & set(found.text), "a shell would read more into it"
    program, *arguments = shlex.split(found.text.replace("\\\n", " "))
    assert program == "raycontrolnet"
    assert cli.main([*arguments, *flags]) == 0


@pytest.fixture(scope="module")
def _ray(workspace: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Start the Ray of all blocks of `run`; its workers start in `workspace`, as relative paths need it."""
    import ray

    ray.shutdown()  # that of other tests, which was started elsewhere
    request.getfixturevalue("_local_ray")
    yield
    ray.shutdown()


@pytest.fixture
def call(request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]) -> Call:
    """call(block, *flags): run a block with more flags in this process, on the shared Ray; returns what it prints."""
    request.getfixturevalue("_ray")

    def call(found: Block, *flags: str) -> str:
        capfd.readouterr()
        if found.language == "python":
            exec(compile(found.text, found.name, "exec"), {"__name__": "__main__"})
        else:
            run_command(found, *flags)
        return "".join(capfd.readouterr())

    return call


def run_in_shell(found: Block, workspace: Path) -> str:
    """Return what the block prints; it must succeed and leave weights where it says."""
    if found.language == "python":
        (workspace / "block.py").write_text(found.command)
        result = run([sys.executable, "block.py"], workspace)
    else:
        result = run(["bash", "-euo", "pipefail", "-c", found.command], workspace)
    assert result.returncode == 0, result.stdout
    assert "Traceback" not in result.stdout
    for output_dir in found.output_dirs:
        assert (workspace / output_dir / WEIGHTS).is_file()
    return result.stdout


def steps(output_dir: Path) -> list[int]:
    return [record["step"] for record in metrics.read(output_dir / metrics.METRICS_FILE)]


def names_in_table(text: str) -> set[str]:
    """Return all code in the first column."""
    return {name for row in re.findall(r"^\| (`.*?) \|", text, re.M) for name in re.findall(r"`(.*?)`", row)}


@pytest.mark.parametrize("found", OTHERS, ids=lambda found: found.name)
def test_block_runs(found: Block, call: Call, trained: Path) -> None:
    short = {"train": HERE, "prepare": HERE, "generate": ("--num_inference_steps", "2")}
    output = call(found, *next((more for name, more in short.items() if f"raycontrolnet {name}" in found.command), ()))
    if "--resume_from_checkpoint latest" in found.command:
        assert "updates 1 to 2" in output
        assert steps(trained / "my-controlnet") == [1, 2]
    elif "torch.optim.RAdam" in found.command:
        (checkpoint, *_) = sorted((trained / "controlnet-radam").glob("checkpoint-*"))
        state = torch.load(checkpoint / "training_state.pt", weights_only=True)
        (group,) = state["optimizer"]["param_groups"]
        assert (state["optimizer_class"], group["weight_decay"], group["betas"]) == ("RAdam", 0.01, (0.9, 0.99))
    elif "xl-base" in found.command:
        config = json.loads((trained / "my-sdxl-controlnet" / "config.json").read_text())
        assert config["addition_embed_type"] == "text_time"
    elif "image.save" in found.command:
        assert (trained / "house.png").is_file()
    elif "raycontrolnet generate" in found.command:
        assert "1 image, grids and metadata.jsonl in " in output
        assert len(list((trained / "generated").glob("*.png"))) == 3
    elif "raycontrolnet condition" in found.command:
        assert "2 rows in " in output
        assert len(open_source(data_config(trained / "my-photos-canny"))) == 2
    elif "raycontrolnet check" in found.command:
        assert "device: fits; the largest batch for the device with 24.0 GiB is " in output
        assert "cost: " in output
    elif "tarfile" in found.command:
        rows, packed = (open_source(data_config(trained / name)) for name in ("my-images", "my-shards"))
        assert [packed.read(row).captions for row in range(2)] == [rows.read(row).captions for row in range(2)]
    else:
        assert "raycontrolnet prepare" in found.command, "an expectation is missing here"
        assert "latents: 2 samples, " in output
        assert len(list((trained / "my-latents").glob("*.arrow"))) == 1


@pytest.mark.slow
def test_the_first_command_in_a_shell(tmp_path: Path, tiny_base: Path) -> None:
    """On a Ray of its own."""
    workspace = write_workspace(tmp_path / "reader", tiny_base)
    assert_first_command(run_in_shell(FIRST, workspace), workspace)


@pytest.mark.slow
@pytest.mark.parametrize("found", SLOW, ids=lambda found: found.name)
def test_block_runs_in_a_shell(found: Block, trained: Path) -> None:
    output = run_in_shell(found, trained)
    if "demo" in found.command:
        assert "raycontrolnet-demo/controlnet" in output
        assert (trained / FOLDER / "controlnet" / WEIGHTS).is_file()
        before, after = re.findall(
            r"control fidelity ([\d.]+) ± [\d.]+ \(2 standard errors\), colours right in (\d+)%", output
        )
        assert float(before[0]) < 0.4
        assert float(after[0]) >= 0.85
        assert int(after[1]) >= 90
    elif "examples/sweep.py" in found.command:
        assert output.count("finished: val_loss") + output.count("stopped: val_loss") == 4
        assert (trained / "example-sweep" / "best" / WEIGHTS).is_file()
    elif "--validation_image" in found.command:
        entries = {path.name for path in (trained / "validated-controlnet" / "validation").glob("step-*/*.png")}
        assert len(entries) == 6  # for each of two pairs an image, the control image and a grid
    elif "GenerateConfig" in found.command:
        assert "houses/pair-00-grid.png" in output
    else:
        assert "done in" in output, "an expectation is missing here"


def test_the_table_of_what_a_run_leaves(tiny_settings: dict[str, Any], circles: Path) -> None:
    changes = {
        "validation_prompt": "a",
        "validation_image": str(circles / "conditioning" / "00000.png"),
        "num_validation_images": 1,
        "report_to": "tensorboard",
        "validation_split": 2,
        "save_name": "NAME",
    }
    result = fit(TrainConfig(**tiny_settings | changes))
    text = section("outputs.md", "What a run leaves")
    left = {path.name for path in result.output_dir.iterdir() if not path.name.startswith(".")}
    if_needed = {"left_out.jsonl"}  # of a run that leaves updates out: test_updates_that_are_not_finite_are_left_out
    assert {re.sub(r"-\d+$", "-N", name) for name in left} == names_in_table(text) - if_needed
    assert result.checkpoint is not None
    assert (result.checkpoint / "controlnet" / "config.json").is_file()
    columns = re.findall(r"`metrics.jsonl` \| one line per update: (.*?) \|", text)[0].split(", ")
    assert list(metrics.read(result.output_dir / metrics.METRICS_FILE)[0]) == columns
    assert yaml.safe_load((result.output_dir / "config.yaml").read_text())["seed"] == 0
    assert re.fullmatch(r"step-\d{6}", next((result.output_dir / "validation").iterdir()).name)


def test_the_sweep_and_what_it_leaves(call: Call, trained: Path) -> None:
    """The command, on so few rows that none can be held out, and the table of its files."""
    found = block("sweep")
    short = "--objective loss --resolution 64 --max_train_steps 2 --validation_steps 1 --num_samples 1"
    assert "the best is in" in call(found, *short.split())
    (output_dir,) = found.output_dirs
    left = {path.name for path in (trained / output_dir).iterdir() if not path.name.startswith(".")}
    assert left == names_in_table(section("sweeps.md", "What a sweep leaves"))
    assert cli.parse("train", ["--config", f"{output_dir}/best/config.yaml"]).max_train_steps == 2


@pytest.mark.slow
def test_the_sweep_from_python(call: Call, trained: Path) -> None:
    found = block("sweep.py")
    changes = {
        "max_train_steps=8000": "max_train_steps=2, resolution=64",
        "validation_steps=500": "validation_steps=1",
        "num_samples=8": 'num_samples=1, objective="loss"',
    }
    output = call(dataclasses.replace(found, text=shortened(found.text, changes)))
    assert f"\n{trained / 'my-second-sweep' / 'best'}\n" in output
    assert re.search(r"^{'learning_rate': [\d.e-]+} finished \d\.\d+$", output, re.M)


def shortened(text: str, changes: Mapping[str, str]) -> str:
    """Return `text` with other settings; each must be there once."""
    for long, short in changes.items():
        assert text.count(long) == 1
        text = text.replace(long, short)
    return text


def data_config(folder: Path) -> TrainConfig:
    return TrainConfig(pretrained_model_name_or_path="base", train_data_dir=str(folder))


def test_data_in_documented_forms(workspace: Path, tmp_path: Path) -> None:
    source = open_source(data_config(workspace / "my-images"))
    assert len(source) == 2
    assert source.read(1).captions == ("a boat", "a white boat in a harbour")
    (line,) = re.findall(r"`prompt.json`: `(.*?)`", TEXTS["data.md"])
    write_data(tmp_path, "prompt.json", line, ("target", "source"))
    original = open_source(data_config(tmp_path))
    assert len(original) == 1
    assert str(original.read(0).image).endswith("target/0.png")
    assert str(original.read(0).conditioning_image).endswith("source/0.png")


@pytest.mark.usefixtures("workspace")
def test_example_settings_file() -> None:
    text = Path("examples/train.yaml").read_text(encoding="utf-8")
    assert cli.parse("train", ["--config", "examples/train.yaml"]).learning_rate == 1e-5
    uncommented = re.sub(r"^# (\w+: )", r"\1", text, flags=re.M)
    assert uncommented.count("\n") == text.count("\n")
    Path("uncommented.yaml").write_text(uncommented)
    assert cli.parse("train", ["--config", "uncommented.yaml"]).gradient_checkpointing


@pytest.mark.usefixtures("workspace")
def test_example_sweep_file() -> None:
    config = cli.parse("tune", ["--config", "examples/sweep.yaml", "--num_samples", "2"])
    assert (config.num_samples, config.grace_period, config.train.max_train_steps) == (2, 2000, 8000)
    assert list(config.parsed_space) == ["learning_rate", "lr_scheduler", "proportion_empty_prompts"]
    text = Path("examples/sweep.yaml").read_text(encoding="utf-8")
    Path("uncommented.yaml").write_text(re.sub(r"^# (\w+: )", r"\1", text, flags=re.M))
    assert cli.parse("tune", ["--config", "uncommented.yaml"]).gpus_per_trial == 0.5


def test_example_script_on_own_data(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    arguments = ["my-images", base, "--num_workers", "0", "--max_train_steps", "1"]
    monkeypatch.setattr(sys, "argv", ["examples/train.py", *arguments])
    runpy.run_path("examples/train.py", run_name="__main__")
    assert "1 updates in" in capsys.readouterr().out
    assert (workspace / "example-controlnet" / "checkpoint-1" / "manifest.json").is_file()


@pytest.mark.slow
def test_example_script_as_it_is(tmp_path: Path, tiny_base: Path) -> None:
    workspace = write_workspace(tmp_path / "reader", tiny_base)
    result = run([sys.executable, "examples/train.py"], workspace)
    assert result.returncode == 0, result.stdout
    assert "50 updates in" in result.stdout
    losses = [record["loss"] for record in metrics.read(workspace / "example-controlnet" / metrics.METRICS_FILE)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.usefixtures("_ray")
def test_example_from_pictures_to_the_hub(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From start to end, on the package's small base model: pictures, edges, training, push, images.

    It trains in this process: others show that a run starts on Ray.
    """
    for name, value in {"MAX_TRAIN_STEPS": "2", "HUB_MODEL_ID": "someone/edges", "HF_TOKEN": "hf_example"}.items():
        monkeypatch.setenv(name, value)
    with HubStandIn("hf_example") as hub:
        take_for_hub(hub.url, monkeypatch)
        example = Path("examples/from_pictures_to_hub.py")
        changes = {
            "range(512)": "range(24)",
            "seed=0,": 'seed=0, num_workers="0", num_validation_images=1,',
            "num_images=2,": "num_images=2, num_inference_steps=2,",
        }
        example.write_text(shortened(example.read_text(encoding="utf-8"), changes), encoding="utf-8")
        runpy.run_path(str(example), run_name="__main__")
        pushed = hub.files["someone/edges"]
    assert pushed["README.md"].startswith(b"---")
    assert pushed[WEIGHTS] == (workspace / "edges-controlnet" / WEIGHTS).read_bytes()
    output = capsys.readouterr().out
    assert "24 rows in " in output
    assert "/someone/edges" in output
    lines = (workspace / "edges-drawn" / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert all(0 <= json.loads(line)["control_fidelity"] <= 1 for line in lines)
