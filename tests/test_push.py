"""Whole runs that push: the command line in a process of its own, the Hub's stand-in at HF_ENDPOINT."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_stand_in import HubStandIn
from safetensors.torch import load_file
from test_export import allowed, snapshot

TOKEN = "hf_TheRightTokenOfAWholeRun"
WRONG = "hf_TheWrongTokenOfAWholeRun"
TIMEOUT_S = 300.0
ADVICE = "Push again, with HF_TOKEN set or after `hf auth login`: "

Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn(TOKEN) as hub:
        yield hub


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """shell(hub, command, **environment): as a user's shell runs it, with no settings of the Hub but these."""

    def shell(hub: HubStandIn, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "RAY_"))}
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        kept |= {"PATH": path, "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "huggingface")}
        kept |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        return subprocess.run(
            command, env=kept | environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )

    return shell


@pytest.fixture
def command(tiny_settings: dict[str, Any], circles: Path, tmp_path: Path) -> list[str]:
    """`raycontrolnet train ... --push_to_hub` of a short run with a validation, on a base model with a licence."""
    base = shutil.copytree(tiny_settings["pretrained_model_name_or_path"], tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: openrail++\n---\n# A base model\n")
    settings = tiny_settings | {
        "pretrained_model_name_or_path": base,
        "max_train_steps": 1,
        "validation_prompt": "red circle",
        "validation_image": circles / "conditioning" / "00000.png",
        "num_validation_images": 1,
        "report_to": "tensorboard",
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "raycontrolnet", "train", *flags, "--push_to_hub"]


@pytest.fixture
def out(tiny_settings: dict[str, Any]) -> Path:
    return Path(tiny_settings["output_dir"])


def status(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "run.json").read_text()))


def assert_arrived(hub: HubStandIn, repo_id: str, out: Path) -> None:
    """Byte for byte what lies in `out`, all of it and nothing else; and every request had the token."""
    sent = allowed(out)
    assert sent.keys() == {
        "config.json", "diffusion_pytorch_model.safetensors", "README.md", "images/pair-00-grid.png",
        "images/pair-00-control.png",
    }  # fmt: skip
    assert hub.files == {repo_id: sent}
    for request in hub.calls:
        wanted = None if request.path.startswith("/storage/") else f"Bearer {TOKEN}"
        assert request.headers.get("authorization") == wanted, request


@pytest.mark.parametrize("given", ["by flag", "by environment", "by login"])
def test_a_run_that_pushes(
    given: str, hub: HubStandIn, command: list[str], out: Path, shell: Shell, tmp_path: Path
) -> None:
    environment = {}
    if given == "by flag":
        command += ["--hub_token", TOKEN]
        environment["HF_TOKEN"] = WRONG  # the flag comes first
    elif given == "by environment":
        environment["HF_TOKEN"] = TOKEN
    login = tmp_path / "huggingface" / "token"
    if given != "by flag":
        login.parent.mkdir()
        login.write_text(TOKEN if given == "by login" else WRONG)
    done = shell(hub, command, **environment)
    assert done.returncode == 0, done.stderr
    assert f"\npushed to {hub.url}/someone/out\ndone in " in done.stderr
    assert_arrived(hub, "someone/out", out)
    card = hub.files["someone/out"]["README.md"].decode()
    assert "\nlicense: openrail++\n" in card
    assert "ControlNetModel.from_pretrained('someone/out')" in card
    assert str(tmp_path) not in card
    assert (status(out)["status"], status(out)["pushed_to"]) == ("finished", f"{hub.url}/someone/out")
    assert "push_failure" not in status(out)
    for secret in (TOKEN, WRONG):
        assert secret not in done.stdout + done.stderr
        assert not [path for path, content in snapshot(out).items() if secret.encode() in content]


def test_a_sweep_that_pushes_its_best(hub: HubStandIn, command: list[str], out: Path, shell: Shell) -> None:
    """The best alone, once, under the sweep's name; and the token nowhere else."""
    space = out.with_name("space.yaml")
    space.write_text("learning_rate: {grid: [1.0e-3, 1.0e-9]}\n")
    flags = ["--space", str(space), "--num_samples", "1", "--objective", "loss", "--scheduler", "none"]
    flags += ["--num_workers", "1", "--hub_token", TOKEN]
    command[command.index("train")] = "tune"
    done = shell(hub, [*command, *flags], HF_TOKEN=WRONG)
    assert done.returncode == 0, done.stderr
    assert f"\npushed to {hub.url}/someone/out\ndone in " in done.stderr
    assert_arrived(hub, "someone/out", out / "best")
    card = hub.files["someone/out"]["README.md"].decode()
    assert "\n# someone/out\n" in card
    assert "ControlNetModel.from_pretrained('someone/out')" in card
    assert "\nlicense: openrail++\n" in card
    assert [request.path for request in hub.calls if "/commit/" in request.path] == [
        "/api/models/someone/out/commit/main"
    ]
    assert TOKEN not in done.stdout + done.stderr
    assert not [path for path, content in snapshot(out).items() if TOKEN.encode() in content]


@pytest.mark.parametrize(
    ("where", "failure", "repo_id", "reason"),
    [
        ("/api/whoami-v2", 401, "out", "the Hub does not accept the token (401)"),
        ("/api/repos/create", 403, "someone/out", "the token may not write there (403)"),
        ("/commit/", 500, "someone/out", "the Hub answers with an error of its own (500)"),
        pytest.param("/storage/", "half", "someone/out", "Error)", marks=pytest.mark.slow),
        pytest.param("/storage/", "stop", "someone/out", "Error)", marks=pytest.mark.slow),
    ],
)
def test_a_push_that_fails_costs_nothing(
    where: str, failure: Any, repo_id: str, reason: str, hub: HubStandIn, command: list[str], out: Path, shell: Shell,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Exit code 1, the reason, a finished run, and a command that repeats the push."""
    hub.failures[where] = failure
    done = shell(hub, command, HF_TOKEN=TOKEN)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stderr
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"error: The push to {repo_id} failed: ")
    assert f"{reason}" in message
    assert f". The finished run in {out} is intact. {ADVICE}hf upload {repo_id} {out} . --include " in message
    assert not any(hub.files.values())

    assert (status(out)["status"], status(out)["step"]) == ("finished", 1)
    assert f"error: {status(out)['push_failure']}" == message
    assert "pushed_to" not in status(out)
    weights = load_file(out / "diffusion_pytorch_model.safetensors")
    checkpoint = load_file(out / "checkpoint-1" / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert len(weights) > 50
    assert all((weights[name] == checkpoint[name]).all() for name in weights.keys() | checkpoint.keys())

    before = snapshot(out)
    with HubStandIn(TOKEN) as mended:
        again = shell(mended, ["bash", "-c", message.partition(ADVICE)[2]], HF_TOKEN=TOKEN)
        assert again.returncode == 0, again.stderr
        assert_arrived(mended, "someone/out", out)
        card = mended.files["someone/out"]["README.md"].decode()
    assert f"ControlNetModel.from_pretrained('{repo_id}')" in card
    assert str(tmp_path) not in card
    assert {path: content for path, content in snapshot(out).items() if path in before} == before
