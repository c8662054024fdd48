"""The blocks of code of README and the guides, and a folder in which a reader could run them.

Every block follows a comment that says what tests do with it:

    <!-- tests: run -->               run in this process, on a Ray that the blocks share
    <!-- tests: slow -->              run in a shell, as a reader would, with `-m slow`
    <!-- tests: job -->, cluster      run against a Ray head by test_job_submit.py
    <!-- tests: runtime_env -->       the same, whose nodes lack the package, by test_runtime_env.py
    <!-- tests: sweep -->, sweep.py   run with settings that make it short
    <!-- tests: skip, REASON -->      cannot run in a test
    <!-- tests: FILE -->              the content of a file that other blocks use
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
from pathlib import Path

import yaml
from base_model import write_random_xl_base

from raycontrolnet.demo.shapes import draw_row

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "examples" / "guides").glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *GUIDES]}
"""Name of the file -> content; README first, as its first command makes what the guides use."""
INSTALLATION = "pip install . && "
RUN_TIMEOUT_S = 400.0
STOP_TIMEOUT_S = 30.0


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code."""

    kind: str
    """Use that tests make of it, or the file that it is the content of."""
    language: str
    text: str

    @property
    def command(self) -> str:
        """The text without the installation, which tests must not repeat."""
        return self.text.removeprefix(INSTALLATION)

    @property
    def name(self) -> str:
        """The folder that it writes to, or else its beginning, for the report of the tests."""
        return next(iter(self.output_dirs), re.sub(r"\W+", "-", self.command)[:40])

    @property
    def output_dirs(self) -> list[str]:
        """The folders of ControlNets that it writes."""
        return re.findall(r'output_dir[ =]"?([\w.-]+)', self.command)


BLOCKS = [
    Block(*found)
    for text in TEXTS.values()
    for found in re.findall(r"^<!-- tests: ([\w.]+)[^>\n]*-->\n```(\w+)\n(.*?)^```$", text, re.M | re.S)
]


def block(kind: str) -> Block:
    """Return the only block of a kind."""
    (found,) = (block for block in BLOCKS if block.kind == kind)
    return found


def section(name: str, heading: str) -> str:
    """Return the part of a document below a heading of second order."""
    return TEXTS[name].split(f"\n## {heading}\n")[1].split("\n## ")[0]


def write_workspace(folder: Path, base: Path) -> Path:
    """Write a folder in which the blocks run: base models, my-images, my-photos, examples, job, and the program."""
    write_base(base, folder / "stable-diffusion-v1-5" / "stable-diffusion-v1-5")
    xl_base = write_random_xl_base(folder / "stabilityai" / "stable-diffusion-xl-base-1.0")
    shutil.copytree(xl_base / "vae", folder / "madebyollin" / "sdxl-vae-fp16-fix")
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


def write_base(base: Path, folder: Path) -> None:
    """Write `base` with another UNet, whose first level has no attention: at 512 px that is 4,096 tokens."""
    from diffusers import UNet2DConditionModel

    shutil.copytree(base, folder)
    config = UNet2DConditionModel.load_config(folder / "unet")
    config |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    config |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")


def write_data(folder: Path, metadata: str, text: str, columns: tuple[str, str]) -> None:
    """Write the data set that a metadata file describes."""
    for index, row in enumerate(map(json.loads, text.splitlines())):
        for column, image in zip(columns, draw_row(index, 32, 0)[:2], strict=True):
            (folder / row[column]).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / row[column])
    (folder / metadata).write_text(text)


def environment(workspace: Path) -> dict[str, str]:
    """Return a user's environment: no Ray except what the command starts, and the program on the PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST"))}
    path = os.pathsep.join((str(workspace / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]))
    return kept | {"PATH": path, "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}


def run(command: list[str], workspace: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in `workspace`; interrupt one that hangs, with all that it has started."""
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
