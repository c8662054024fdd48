"""The push to the Hub, over HTTP to a stand-in: what arrives, what fails, and whole runs that push."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hub_stand_in import HubStandIn, take_for_hub
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from runs import contents, flags
from safetensors.torch import load_file

from raycontrolnet import SweepConfig, TrainConfig, sweep
from raycontrolnet.config.checks import find_token
from raycontrolnet.errors import RunError
from raycontrolnet.hub import push
from raycontrolnet.hub.push import check_push, push_command, push_to_hub, resolve_repo_id

TOKEN = "hf_TheRightToken"
WRONG = "hf_TheWrongToken"
TIMEOUT_S = 300.0
ADVICE = "Push again, with HF_TOKEN set or after `hf auth login`: "

Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with HubStandIn(TOKEN) as hub:
        take_for_hub(hub.url, monkeypatch)
        yield hub


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Write a finished run: files to upload, and many that must not be."""
    folder = tmp_path / "circles-run"
    uploaded = {
        "config.json": b'{"_class_name": "ControlNetModel"}',
        "diffusion_pytorch_model.safetensors": bytes(range(256)) * 4000,
        "README.md": b"---\nlicense: mit\n---\n# circles-run\n",
        "images/pair-00-grid.png": b"a picture",
        "images/pair-00-control.png": b"a control image",
    }
    kept = ["config.yaml", "run.json", "metrics.jsonl", "images/notes.txt", "images/more/x.png", "other.png"]
    kept += ["logs/events.out", "validation/step-000002/pair-00-grid.png", "checkpoint-2/README.md"]
    kept += [f"checkpoint-2/controlnet/{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")]
    for name, content in {**dict.fromkeys(kept, b"stays here"), **uploaded}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


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
def settings(tiny_settings: dict[str, Any], circles: Path, tmp_path: Path) -> dict[str, Any]:
    """Return the settings of a short run with a validation, on a base model with a licence."""
    base = shutil.copytree(tiny_settings["pretrained_model_name_or_path"], tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: openrail++\n---\n# A base model\n")
    return tiny_settings | {
        "pretrained_model_name_or_path": str(base),
        "max_train_steps": 1,
        "validation_prompt": "red circle",
        "validation_image": str(circles / "conditioning" / "00000.png"),
        "num_validation_images": 1,
        "report_to": "tensorboard",
    }


@pytest.fixture
def command(settings: dict[str, Any]) -> list[str]:
    """`raycontrolnet train ... --push_to_hub`."""
    return [sys.executable, "-m", "raycontrolnet", "train", *flags(settings), "--push_to_hub"]


@pytest.fixture
def out(tiny_settings: dict[str, Any]) -> Path:
    return Path(tiny_settings["output_dir"])


def status(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "run.json").read_text()))


def allowed(folder: Path) -> dict[str, bytes]:
    names = ("config.json", "diffusion_pytorch_model.safetensors", "README.md")
    paths = [*(folder / name for name in names), *folder.glob("images/*.png")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


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


def test_push(hub: HubStandIn, run_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = contents(run_folder)
    repo_id = resolve_repo_id(run_folder, None, TOKEN)
    assert repo_id == "someone/circles-run"
    for _ in range(2):  # also into a repository that is there
        url = push_to_hub(run_folder, repo_id=repo_id, token=TOKEN)
        assert url == f"{hub.url}/someone/circles-run"
    assert_arrived(hub, repo_id, run_folder)
    assert hub.commits == ["End of training"] * 2
    assert [request.path for request in hub.requests if request.method == "PUT"]  # the weights came by LFS
    assert not [request for request in hub.requests if TOKEN.encode() in request.body]
    assert contents(run_folder) == before
    assert capfd.readouterr() == ("", "")


def test_the_command_repeats_the_push(hub: HubStandIn, run_folder: Path, shell: Shell) -> None:
    folder = run_folder.rename(run_folder.with_name("it's here"))
    done = shell(hub, shlex.split(push_command(folder, "someone/again")), HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    received = hub.files["someone/again"]
    # fnmatch's * goes into folders: there are none in images/ unless a user makes one
    received.pop("images/more/x.png", None)
    assert received == allowed(folder)


@pytest.mark.parametrize(
    ("where", "failure", "reason"),
    [
        ("/api/repos/create", 401, r"the Hub does not accept the token \(401\)"),
        ("/api/repos/create", 403, r"the token may not write there \(403\)"),
        ("/api/repos/create", 500, r"the Hub answers with an error of its own \(500\)"),
        ("/preupload/", 404, r"the Hub knows no such repository or owner \(404\)"),
        ("/preupload/", 503, r"an error of its own \(503\)"),
        ("/storage/", 500, r"an error of its own \(500\)"),
        ("/storage/", "cut", r"\w+Error\)\. The finished"),
        ("/storage/", "half", r"\w+Error\)\. The finished"),
        ("/api/validate-yaml", 400, r"as asked.*\(BadRequestError\)\. The finished"),
        ("/commit/", 403, r"\(403\)"),
        ("/commit/", 500, r"\(500\)"),
        ("/commit/", "cut", r"\w+Error\)\. The finished"),
    ],
)
def test_a_push_that_fails(
    where: str, failure: Any, reason: str, hub: HubStandIn, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between its retries
    hub.failures[where] = failure
    before = contents(run_folder)
    with pytest.raises(RunError, match=reason) as error:
        push_to_hub(run_folder, repo_id="someone/model", token=TOKEN)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("The push to someone/model failed: ")
    assert f"The finished run in {run_folder} is intact. Push again" in message
    assert message.endswith(push_command(run_folder, "someone/model"))
    assert TOKEN not in message
    assert error.value.__cause__ is None
    assert error.value.__context__ is None
    assert contents(run_folder) == before
    assert not hub.files.get("someone/model")
    hub.failures.clear()
    push_to_hub(run_folder, repo_id="someone/model", token=TOKEN)
    assert hub.files["someone/model"] == allowed(run_folder)


def test_a_push_without_a_hub_or_files_or_token(
    hub: HubStandIn, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match=r"to someone/model failed: the Hub does not accept the token \(401\)"):
        push_to_hub(run_folder, repo_id="someone/model", token=WRONG)
    with pytest.raises(RunError, match="there is no token: give --hub_token"):
        push_to_hub(run_folder, repo_id="someone/model", token=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"empty has no config.json and no diffusion_pytorch_model.safetensors"):
        push_to_hub(tmp_path / "empty", repo_id="someone/model", token=TOKEN)
    with pytest.raises(RunError, match=r"The push to circles-run failed: .*\(401\)"):
        resolve_repo_id(run_folder, None, WRONG)
    take_for_hub("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(RunError, match=r"ConnectError\)\. The finished run"):
        push_to_hub(run_folder, repo_id="someone/model", token=TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match=r"offline mode is enabled.*OfflineModeIsEnabled\)"):
        push_to_hub(run_folder, repo_id="someone/model", token=TOKEN)


def test_repo_ids(hub: HubStandIn, tmp_path: Path) -> None:
    assert resolve_repo_id(tmp_path, "org/name", None) == "org/name"
    assert not hub.requests
    assert resolve_repo_id(tmp_path, "name", TOKEN) == "someone/name"
    assert resolve_repo_id(tmp_path / "my run (2)..", None, TOKEN) == "someone/my-run-2"


def test_check_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "find_token", lambda hub_token: hub_token)
    given: dict[str, Any] = {"output_dir": str(tmp_path), "pretrained_model_name_or_path": "b", "train_data_dir": "d"}
    assert check_push(TrainConfig(**given), tmp_path) == []
    assert check_push(TrainConfig(**given, push_to_hub=True, hub_token=TOKEN, hub_model_id="a/b"), tmp_path) == []
    no_token, bad_name = check_push(TrainConfig(**given, push_to_hub=True, hub_model_id="a b"), tmp_path)
    assert no_token == "--push_to_hub: needs a token: give --hub_token, set HF_TOKEN, or run `hf auth login`"
    assert bad_name.startswith("--hub_model_id=a b: ")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("my run (2)", "my-run-2"),
        ("a - b", "a-b"),
        ("a--b..c", "a-b.c"),
        (".hidden", "hidden"),
        ("x" * 120, "x" * 96),
        ("x" * 95 + "--y", "x" * 95),
        ("café über", "cafe-uber"),
        ("model.git", "model"),
        ("_-_", "_-_"),
        ("模型", ""),
        ("- .", ""),
    ],
)
def test_names_made_of_folders(folder: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub takes every one of them; where nothing is left of a name, the run is refused before it begins."""
    monkeypatch.setattr(push, "find_token", lambda hub_token: TOKEN)
    settings = TrainConfig(pretrained_model_name_or_path="b", train_data_dir="d", push_to_hub=True)
    assert push.repo_name(tmp_path / folder, None) == name
    problems = check_push(settings, tmp_path / folder)
    if name:
        validate_repo_id(name)
        assert problems == []
    else:
        wrong = f"needs a name for the repository, and the folder {folder!r} of --output_dir gives none"
        assert problems == [f"--push_to_hub: {wrong}; give --hub_model_id"]
    assert check_push(dataclasses.replace(settings, hub_model_id="a/b"), tmp_path / folder) == []


def test_find_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    login = tmp_path / "token"
    login.write_text("hf_of_login")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(login))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert find_token(None) == "hf_of_login"
    monkeypatch.setenv("HF_TOKEN", "hf_of_environment")
    assert find_token(None) == "hf_of_environment"
    assert find_token(TOKEN) == TOKEN


# --- whole runs, in processes of their own ---


@pytest.mark.parametrize(
    "given", ["by flag", *(pytest.param(given, marks=pytest.mark.slow) for given in ("by environment", "by login"))]
)
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
        assert not [path for path, content in contents(out).items() if secret.encode() in content]


@pytest.mark.usefixtures("_local_ray")
def test_a_sweep_that_pushes_its_best(
    hub: HubStandIn,
    settings: dict[str, Any],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The best alone, once, under the sweep's name; and the token nowhere else."""
    monkeypatch.setenv("HF_TOKEN", WRONG)
    train = TrainConfig(**settings | {"num_workers": "1", "push_to_hub": True, "hub_token": TOKEN})
    space = {"learning_rate": {"grid": [1e-3, 1e-9]}}
    config = SweepConfig(train=train, space=space, num_samples=1, objective="loss", scheduler="none")
    sweep(dataclasses.replace(config, max_concurrent_trials=1))
    shown = "".join(capfd.readouterr())
    assert f"\npushed to {hub.url}/someone/out\ndone in " in shown
    assert_arrived(hub, "someone/out", out / "best")
    card = hub.files["someone/out"]["README.md"].decode()
    assert "\n# someone/out\n" in card
    assert "ControlNetModel.from_pretrained('someone/out')" in card
    assert "\nlicense: openrail++\n" in card
    assert [request.path for request in hub.calls if "/commit/" in request.path] == [
        "/api/models/someone/out/commit/main"
    ]
    assert TOKEN not in shown
    assert not [path for path, content in contents(out).items() if TOKEN.encode() in content]


@pytest.mark.parametrize(
    ("where", "failure", "repo_id", "reason"),
    [
        ("/api/whoami-v2", 401, "out", "the Hub does not accept the token (401)"),
        *(
            pytest.param(*failure, marks=pytest.mark.slow)
            for failure in (
                ("/api/repos/create", 403, "someone/out", "the token may not write there (403)"),
                ("/commit/", 500, "someone/out", "the Hub answers with an error of its own (500)"),
                ("/storage/", "half", "someone/out", "Error)"),
                ("/storage/", "stop", "someone/out", "Error)"),
            )
        ),
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

    before = contents(out)
    with HubStandIn(TOKEN) as mended:
        again = shell(mended, ["bash", "-c", message.partition(ADVICE)[2]], HF_TOKEN=TOKEN)
        assert again.returncode == 0, again.stderr
        assert_arrived(mended, "someone/out", out)
        card = mended.files["someone/out"]["README.md"].decode()
    assert f"ControlNetModel.from_pretrained('{repo_id}')" in card
    assert str(tmp_path) not in card
    assert {path: content for path, content in contents(out).items() if path in before} == before
