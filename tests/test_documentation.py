"""What README and the examples say is so: their commands are run as they stand, their names and files exist.

Every block of code in README follows a comment that says what tests do with it:

    <!-- tests: run -->               run here, in a folder with the data, base model and files that README speaks of
    <!-- tests: slow -->              the same, with `-m slow`
    <!-- tests: job -->, cluster      run against a Ray head by test_job_submit.py
    <!-- tests: sweep -->             run with settings that make it short
    <!-- tests: skip, REASON -->      cannot run in a test
    <!-- tests: FILE -->              the content of a file that the other blocks use
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_stand_in import HubStandIn
from PIL import Image

from raycontrolnet import ConditionConfig, GenerateConfig, TrainConfig, cli, fit
from raycontrolnet.config.declare import title
from raycontrolnet.config.space import read_space
from raycontrolnet.config.sweep_config import SweepSettings
from raycontrolnet.config.train_config import GROUPS
from raycontrolnet.config.values import setting_types
from raycontrolnet.data.sources import open_source
from raycontrolnet.demo.demo import FOLDER, run_demo
from raycontrolnet.demo.shapes import draw_row
from raycontrolnet.errors import Interrupted, RunError, UserError
from raycontrolnet.training import metrics

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ("run", "slow", "job", "cluster", "skip")
INSTALLATION = "pip install . && "
RUN_TIMEOUT_S = 400.0
STOP_TIMEOUT_S = 30.0


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code of README."""

    kind: str
    """What tests do with it, or the file that it is the content of."""
    language: str
    text: str

    @property
    def command(self) -> str:
        """As a reader copies it, but for the installation, which tests must not repeat."""
        return self.text.removeprefix(INSTALLATION)

    @property
    def name(self) -> str:
        """For the report of the tests: where it writes, or else its beginning."""
        return next(iter(self.output_dirs), re.sub(r"\W+", "-", self.command)[:40])

    @property
    def output_dirs(self) -> list[str]:
        return re.findall(r'output_dir[ =]"?([\w.-]+)', self.command)


BLOCKS = [
    Block(*found) for found in re.findall(r"^<!-- tests: ([\w.]+)[^>\n]*-->\n```(\w+)\n(.*?)^```$", README, re.M | re.S)
]


def block(kind: str) -> Block:
    (found,) = (block for block in BLOCKS if block.kind == kind)
    return found


def blocks(*kinds: str) -> list[Any]:
    return [
        pytest.param(found, id=found.name, marks=[pytest.mark.slow] if found.kind == "slow" else [])
        for found in BLOCKS
        if found.kind in kinds
    ]


def write_workspace(folder: Path, base: Path) -> Path:
    """A folder in which README's commands run: base model, my-images, my-photos, examples, job, and the program."""
    shutil.copytree(base, folder / "stable-diffusion-v1-5" / "stable-diffusion-v1-5")
    shutil.copytree(ROOT / "examples", folder / "examples")
    write_data(folder / "my-images", "metadata.jsonl", block("metadata.jsonl").text, ("image", "conditioning_image"))
    (folder / "my-photos").mkdir()
    for index in range(2):
        image, _, text = draw_row(index, 64, 0)
        image.save(folder / "my-photos" / f"{index}.jpg")
        (folder / "my-photos" / f"{index}.txt").write_text(text)
    settings = yaml.safe_load((ROOT / "examples" / "train.yaml").read_text()) | {"max_train_steps": 2, "resolution": 32}
    for name in ("pretrained_model_name_or_path", "train_data_dir", "output_dir"):
        settings[name] = str(folder / settings[name])
    for name in [name for name in settings if name.startswith("validation_")]:
        del settings[name]
    (folder / "job").mkdir()
    (folder / "job" / "train.yaml").write_text(yaml.safe_dump(settings))
    program = folder / "bin" / "raycontrolnet"  # as the console script, which a source tree does not have
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m raycontrolnet "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return folder


def write_data(folder: Path, metadata: str, text: str, columns: tuple[str, str]) -> None:
    """The data set whose metadata file README shows."""
    for index, row in enumerate(map(json.loads, text.splitlines())):
        for column, image in zip(columns, draw_row(index, 32, 0)[:2], strict=True):
            (folder / row[column]).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / row[column])
    (folder / metadata).write_text(text)


def environment(workspace: Path) -> dict[str, str]:
    """As a user has it: no Ray but what the command starts, and the program on the PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST"))}
    path = os.pathsep.join((str(workspace / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]))
    return kept | {"PATH": path, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}


def run(command: list[str], workspace: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in `workspace`; one that hangs is interrupted with all that it has started."""
    process = subprocess.Popen(
        command,
        cwd=workspace,
        env=env or environment(workspace),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            output, _ = process.communicate(timeout=RUN_TIMEOUT_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.communicate(timeout=STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def run_block(found: Block, workspace: Path) -> str:
    """What the block prints; it must succeed, and leave weights where it says."""
    if found.language == "python":
        (workspace / "block.py").write_text(found.command)
        result = run([sys.executable, "block.py"], workspace)
    else:
        result = run(["bash", "-euo", "pipefail", "-c", found.command], workspace)
    assert result.returncode == 0, result.stdout
    assert "Traceback" not in result.stdout
    for output_dir in found.output_dirs:
        assert (workspace / output_dir / "diffusion_pytorch_model.safetensors").is_file()
    return result.stdout


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return write_workspace(tmp_path_factory.mktemp("reader"), tiny_base)


@pytest.fixture(scope="module")
def trained(workspace: Path) -> Path:
    """`workspace` after README's first training command, which the blocks after it build on."""
    output = run_block(FIRST, workspace)
    assert "step 1/1 | loss" in output
    assert "done in" in output
    return workspace


FIRST, *OTHERS = (found for found in BLOCKS if found.kind == "run")


def test_readme_is_read() -> None:
    assert Counter(found.kind for found in BLOCKS) == {
        "run": 6,
        "slow": 7,
        "job": 1,
        "cluster": 1,
        "skip": 4,
        "sweep": 1,
        "sweep.py": 1,
        "metadata.jsonl": 1,
        "space.yaml": 1,
    }
    assert len(BLOCKS) == len(re.findall(r"^```\w+$", README, re.M)), "a block without a comment for the tests"
    assert FIRST.output_dirs == ["my-controlnet"]
    assert "my-images" in FIRST.command
    assert sum(found.text.startswith(INSTALLATION) for found in BLOCKS) == 1


def test_the_first_command_trains(trained: Path) -> None:
    assert [record["step"] for record in metrics.read(trained / "my-controlnet" / metrics.METRICS_FILE)] == [1]


@pytest.mark.parametrize("found", blocks("run", "slow"))
def test_block_runs(found: Block, trained: Path) -> None:
    if found == FIRST:
        return  # has run: `trained`
    output = run_block(found, trained)
    if "--resume_from_checkpoint latest" in found.command:
        assert "updates 1 to 2" in output
        assert [record["step"] for record in metrics.read(trained / "my-controlnet" / metrics.METRICS_FILE)] == [1, 2]
    elif "image.save" in found.command:
        assert (trained / "house.png").is_file()
    elif "demo" in found.command:
        assert "raycontrolnet-demo/controlnet" in output
        assert (trained / FOLDER / "controlnet" / "diffusion_pytorch_model.safetensors").is_file()
        before, after = re.findall(r"control fidelity ([\d.]+) ± [\d.]+, colours right in (\d+)%", output)
        assert float(before[0]) < 0.4
        assert float(after[0]) >= 0.85
        assert int(after[1]) >= 90
    elif "examples/sweep.py" in found.command:
        assert output.count("finished: val_loss") + output.count("stopped: val_loss") == 4
        assert (trained / "example-sweep" / "best" / "diffusion_pytorch_model.safetensors").is_file()
    elif "--validation_image" in found.command:
        entries = {path.name for path in (trained / "validated-controlnet" / "validation").glob("step-*/*.png")}
        assert len(entries) == 6  # for each of two pairs an image, the control image and a grid
    elif "raycontrolnet generate" in found.command:
        assert "1 image, grids and metadata.jsonl in " in output
        assert len(list((trained / "generated").glob("*.png"))) == 3
    elif "GenerateConfig" in found.command:
        assert "houses/pair-00-grid.png" in output
    elif "raycontrolnet condition" in found.command:
        assert "2 rows in " in output
        data = TrainConfig(pretrained_model_name_or_path="base", train_data_dir=str(trained / "my-photos-canny"))
        assert len(open_source(data)) == 2
    elif "raycontrolnet prepare" in found.command:
        assert "latents: 2 samples, " in output
        assert len(list((trained / "my-latents").glob("*.arrow"))) == 1
    else:
        assert "done in" in output, "an expectation is missing here"


def test_the_table_of_what_a_run_leaves(tiny_settings: dict[str, Any], circles: Path) -> None:
    section = README.split("## What a run leaves")[1].split("\n## ")[0]
    names = {name for row in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(.*?)`", row)}
    control = str(circles / "conditioning" / "00000.png")
    changes = {
        "validation_prompt": "a",
        "validation_image": control,
        "num_validation_images": 1,
        "report_to": "tensorboard",
        "validation_split": 2,
    }
    result = fit(TrainConfig(**tiny_settings | changes))
    left = {path.name for path in result.output_dir.iterdir() if not path.name.startswith(".")}
    assert {re.sub(r"-\d+$", "-N", name) for name in left} == names
    assert result.checkpoint is not None
    assert (result.checkpoint / "controlnet" / "config.json").is_file()
    columns = re.findall(r"`metrics.jsonl` \| one line per update: (.*?) \|", section)[0].split(", ")
    assert list(metrics.read(result.output_dir / metrics.METRICS_FILE)[0]) == columns
    assert yaml.safe_load((result.output_dir / "config.yaml").read_text())["seed"] == 0
    assert re.fullmatch(r"step-\d{6}", next((result.output_dir / "validation").iterdir()).name)


def test_the_sweep_and_what_it_leaves(workspace: Path, tmp_path: Path) -> None:
    """The command, on so few rows that none can be held out; the table below it, and the default space above."""
    (found,) = (block for block in BLOCKS if block.kind == "sweep")
    short = "--objective loss --report_to tensorboard --max_train_steps 2 --validation_steps 1 --num_samples 1"
    result = run(["bash", "-euo", "pipefail", "-c", f"{found.command.rstrip()} {short}"], workspace)
    assert result.returncode == 0, result.stdout
    assert "the best is in" in result.stdout
    (output_dir,) = found.output_dirs
    section = README.split("## Finding settings")[1].split("\n## ")[0]
    table = section.split("In `--output_dir`:")[1].split("\n\n")[1]
    names = {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(.*?)`", row)}
    left = {path.name for path in (workspace / output_dir).iterdir() if not path.name.startswith(".")}
    assert left == names
    best = workspace / output_dir / "best" / "config.yaml"
    assert cli.parse("train", ["--config", str(best)]).max_train_steps == 2
    file = tmp_path / "space.yaml"
    file.write_text(block("space.yaml").text)
    assert read_space(file) == read_space(None)


def test_the_sweep_from_python(workspace: Path) -> None:
    text = block("sweep.py").text
    for long, short in {
        "max_train_steps=8000": "max_train_steps=2",
        "validation_steps=500": "validation_steps=1",
        "num_samples=8": 'num_samples=1, objective="loss"',
    }.items():
        assert text.count(long) == 1
        text = text.replace(long, short)
    (workspace / "sweep.py").write_text(text)
    result = run([sys.executable, "sweep.py"], workspace)
    assert result.returncode == 0, result.stdout
    assert result.stdout.splitlines()[-1] == str(workspace / "my-second-sweep" / "best")
    assert re.search(r"^{'learning_rate': [\d.e-]+} finished \d\.\d+$", result.stdout, re.M)


def test_data_in_the_forms_of_readme(workspace: Path, tmp_path: Path) -> None:
    source = open_source(TrainConfig(pretrained_model_name_or_path="base", train_data_dir=str(workspace / "my-images")))
    assert len(source) == 2
    assert source.read(1).captions == ("a boat", "a white boat in a harbour")
    (line,) = re.findall(r"`prompt.json`: `(.*?)`", README)
    write_data(tmp_path, "prompt.json", line, ("target", "source"))
    original = open_source(TrainConfig(pretrained_model_name_or_path="base", train_data_dir=str(tmp_path)))
    assert len(original) == 1
    assert str(original.read(0).image).endswith("target/0.png")
    assert str(original.read(0).conditioning_image).endswith("source/0.png")


def test_settings_table() -> None:
    section = README.split("## Settings")[1].split("\n## ")[0]
    table = {
        group: re.findall(r"`--(\w+)`", names)
        for group, names in re.findall(r"^\| (\w+) \| (`--.*) \|$", section, re.M)
    }
    groups = (*GROUPS, SweepSettings)
    assert table == {title(group): [field.name for field in dataclasses.fields(group)] for group in groups}
    assert sum(map(len, table.values())) >= 58


@pytest.mark.parametrize(
    ("path", "at_least"), [("README.md", 90), ("CHANGELOG.md", 5), ("cluster.yaml", 3), ("examples/train.py", 1)]
)
def test_flags_exist(path: str, at_least: int) -> None:
    """Ours have underscores or are one word; what has hyphens belongs to others."""
    of_others = {"logdir", "head", "region", "query", "output", "name", "port", "ulimit"}
    flags = re.findall(r"(?<![\w-])--(\w+)(?![\w-])", (ROOT / path).read_text(encoding="utf-8"))
    assert len(flags) >= at_least
    ours = {
        *setting_types(TrainConfig),
        *setting_types(GenerateConfig),
        *setting_types(ConditionConfig),
        "config",
        "help",
    }
    ours |= {*setting_types(SweepSettings)}
    assert set(flags) - ours - of_others == set()


def test_commands_and_flags_are_in_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    shell = "\n".join(found.text for found in BLOCKS if found.language == "bash")
    commands = set(re.findall(r"raycontrolnet ([a-z]+)\b", shell))
    assert commands == {"train", "tune", "prepare", "condition", "generate", "demo"}
    assert commands <= set(re.findall(r"raycontrolnet ([a-z]+)\b", usage))
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", "--help"])
    assert exit_info.value.code == 0
    help_text = capsys.readouterr().out
    assert [name for name in setting_types(TrainConfig) if f"--{name}" not in help_text] == []
    with pytest.raises(SystemExit):
        cli.main(["tune", "--help"])
    help_text = capsys.readouterr().out
    of_a_sweep = [*setting_types(TrainConfig), *setting_types(SweepSettings)]
    assert [name for name in of_a_sweep if f"--{name}" not in help_text] == []


def test_exit_codes() -> None:
    table = {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| (.*) \|$", README, re.M)}
    assert set(table) == {0, RunError.exit_code, UserError.exit_code, Interrupted.exit_code}
    assert "Ctrl-C" in table[Interrupted.exit_code]


@pytest.mark.parametrize(("path", "at_least"), [("README.md", 8), ("CHANGELOG.md", 0), ("CONTRIBUTING.md", 0)])
def test_links_lead_to_files(path: str, at_least: int) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert len(targets) >= at_least
    headings = {
        "#" + re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    assert [target for target in targets if target not in headings and not (ROOT / target).is_file()] == []


def test_contributing_names_files() -> None:
    """The tests may run without the package's sources beside them: they are where Python finds them."""
    spec = find_spec("raycontrolnet")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:tests/|data/|model/|run/|tune/)?[\w/]+\.(?:py|md|toml))`", text)
    assert len(names) >= 15
    assert [name for name in names if not (package / name).is_file() and not (ROOT / name).is_file()] == []


def test_example_settings_file(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    text = Path("examples/train.yaml").read_text(encoding="utf-8")
    assert cli.parse("train", ["--config", "examples/train.yaml"]).learning_rate == 1e-5
    uncommented = re.sub(r"^# (\w+: )", r"\1", text, flags=re.M)
    assert uncommented.count("\n") == text.count("\n")
    Path("uncommented.yaml").write_text(uncommented)
    assert cli.parse("train", ["--config", "uncommented.yaml"]).gradient_checkpointing


def test_example_sweep_file(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    text = Path("examples/sweep.yaml").read_text(encoding="utf-8")
    config = cli.parse("tune", ["--config", "examples/sweep.yaml", "--num_samples", "2"])
    assert (config.num_samples, config.grace_period, config.train.max_train_steps) == (2, 2000, 8000)
    assert list(config.parsed_space) == ["learning_rate", "lr_scheduler", "proportion_empty_prompts"]
    uncommented = re.sub(r"^# (\w+: )", r"\1", text, flags=re.M)
    Path("uncommented-sweep.yaml").write_text(uncommented.partition("\n")[2])
    assert cli.parse("tune", ["--config", "uncommented-sweep.yaml"]).gpus_per_trial == 0.5


def test_example_script_on_own_data(workspace: Path) -> None:
    base = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    command = [sys.executable, "examples/train.py", "my-images", base, "--num_workers", "0", "--max_train_steps", "1"]
    result = run(command, workspace)
    assert result.returncode == 0, result.stdout
    assert "1 updates in" in result.stdout
    assert (workspace / "example-controlnet" / "checkpoint-1" / "manifest.json").is_file()


@pytest.mark.slow
def test_example_script_as_it_is(tmp_path: Path, tiny_base: Path) -> None:
    workspace = write_workspace(tmp_path / "reader", tiny_base)
    result = run([sys.executable, "examples/train.py"], workspace)
    assert result.returncode == 0, result.stdout
    assert "50 updates in" in result.stdout
    losses = [record["loss"] for record in metrics.read(workspace / "example-controlnet" / metrics.METRICS_FILE)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.fixture
def demo_flags(tiny_base: Path, circles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A demo of two updates in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return [
        *("--pretrained_model_name_or_path", str(tiny_base), "--train_data_dir", str(circles), "--resolution", "32"),
        *("--num_workers", "0", "--max_train_steps", "2", "--checkpointing_steps", "1", "--report_to", "none"),
    ]


def test_a_second_demo_takes_a_new_folder(demo_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", *demo_flags]) == 0
    first = capsys.readouterr()
    assert "The ControlNet is in raycontrolnet-demo/controlnet," in first.out
    assert "raycontrolnet train --pretrained_model_name_or_path" in first.out
    assert "control fidelity" not in first.out, "it is measured on the demo's own base model"
    assert "writing" not in first.err, "the demo's base and data were not asked for"
    kept = {path: path.stat().st_mtime_ns for path in (FOLDER / "controlnet").rglob("*")}
    assert len(kept) > 8

    assert cli.main(["demo", *demo_flags]) == 0
    second = capsys.readouterr()
    assert (
        "raycontrolnet-demo/controlnet holds an earlier demo (up to update 2); this one goes to "
        "raycontrolnet-demo/controlnet-2" in second.err
    )
    assert "The ControlNet is in raycontrolnet-demo/controlnet-2," in second.out
    assert {path: path.stat().st_mtime_ns for path in (FOLDER / "controlnet").rglob("*")} == kept

    assert cli.main(["demo", *demo_flags, "--resume_from_checkpoint", "checkpoint-1"]) == 0
    assert "updates 1 to 2" in capsys.readouterr().err
    assert not (FOLDER / "controlnet-3").exists()

    named = ["--output_dir", str(FOLDER / "controlnet-2")]
    assert cli.main(["demo", *demo_flags, *named]) == 2
    assert "holds checkpoint-2 of an earlier run" in capsys.readouterr().err


def test_demo_writes_what_it_needs_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("raycontrolnet.demo.demo.NUM_UNSEEN", 4)
    monkeypatch.setattr("raycontrolnet.demo.demo.NUM_ROWS", 40)
    flags = ["--num_workers", "0", "--max_train_steps", "2", "--validation_steps", "2", "--report_to", "none"]
    result = run_demo(cli.parse("demo", flags))
    output = capsys.readouterr()
    found = re.findall(r"^  (before|after) +control fidelity (\S+) ± \S+, colours right in (\d+)%$", output.out, re.M)
    assert [name for name, _, _ in found] == ["before", "after"]
    assert all(0 < float(fidelity) < 0.9 for _, fidelity, _ in found)
    assert all(int(right) >= 75 for _, _, right in found), "the base model draws the colours of the prompt"
    (picture,) = re.findall(r"^  picture  (\S+)$", output.out, re.M)
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > 1000
    assert len((FOLDER / "shapes" / "metadata.jsonl").read_text().splitlines()) == 40
    assert "in a folder like raycontrolnet-demo/shapes" in output.out
    assert result.control_fidelity is not None
    figures = json.loads((FOLDER / "controlnet" / "demo.json").read_text())
    assert [f"{figures[name]['control_fidelity']:.2f}" for name, _, _ in found] == [shown for _, shown, _ in found]


def test_example_from_pictures_to_the_hub(tmp_path: Path) -> None:
    """From start to end, on the package's small base model: pictures, edges, training, push, images."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    with HubStandIn("hf_example") as hub:
        result = run(
            [sys.executable, "examples/from_pictures_to_hub.py"],
            tmp_path,
            environment(tmp_path)
            | {"MAX_TRAIN_STEPS": "2", "HUB_MODEL_ID": "someone/edges", "HF_TOKEN": "hf_example"}
            | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
        )
        assert result.returncode == 0, result.stdout
        pushed = hub.files["someone/edges"]
    assert pushed["README.md"].startswith(b"---")
    weights = "diffusion_pytorch_model.safetensors"
    assert pushed[weights] == (tmp_path / "edges-controlnet" / weights).read_bytes()
    assert "512 rows in " in result.stdout
    assert "/someone/edges" in result.stdout
    lines = (tmp_path / "edges-drawn" / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert all(0 <= json.loads(line)["control_fidelity"] <= 1 for line in lines)


def test_demo_says_that_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    FOLDER.write_text("a file is in the way")
    assert cli.main(["demo"]) == 2
    message = capsys.readouterr().err
    assert f"error: {tmp_path / FOLDER}: cannot be written (File exists); run the demo in another folder" in message
