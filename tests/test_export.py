"""The push to the Hub: over HTTP to a stand-in, with what arrived compared byte for byte."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from hub_stand_in import HubStandIn

from raycontrolnet.config.checks import find_token
from raycontrolnet.config.train_config import TrainConfig
from raycontrolnet.errors import RunError
from raycontrolnet.hub import push
from raycontrolnet.hub.push import check_push, push_command, push_to_hub, resolve_repo_id

TOKEN = "hf_TheRightToken"


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
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with HubStandIn(TOKEN) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        yield hub


def allowed(folder: Path) -> dict[str, bytes]:
    names = ("config.json", "diffusion_pytorch_model.safetensors", "README.md")
    paths = [*(folder / name for name in names), *folder.glob("images/*.png")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_push(hub: HubStandIn, run_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = snapshot(run_folder)
    repo_id = resolve_repo_id(run_folder, None, TOKEN)
    assert repo_id == "someone/circles-run"
    for _ in range(2):  # also into a repository that is there
        url = push_to_hub(run_folder, repo_id=repo_id, token=TOKEN)
        assert url == f"{hub.url}/someone/circles-run"
    assert hub.files == {"someone/circles-run": allowed(run_folder)}
    assert len(hub.files[repo_id]) == 5
    assert hub.commits == ["End of training"] * 2
    assert [request.path for request in hub.requests if request.method == "PUT"]  # the weights came by LFS
    for request in hub.requests:
        wanted = None if request.path.startswith("/storage/") else f"Bearer {TOKEN}"
        assert request.headers.get("authorization") == wanted
        assert TOKEN.encode() not in request.body
    assert snapshot(run_folder) == before
    assert capfd.readouterr() == ("", "")


def test_the_command_repeats_the_push(hub: HubStandIn, run_folder: Path) -> None:
    folder = run_folder.rename(run_folder.with_name("it's here"))
    command = [str(Path(sys.executable).with_name("hf")), *shlex.split(push_command(folder, "someone/again"))[1:]]
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
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
    before = snapshot(run_folder)
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
    assert snapshot(run_folder) == before
    assert not hub.files.get("someone/model")
    hub.failures.clear()
    push_to_hub(run_folder, repo_id="someone/model", token=TOKEN)
    assert hub.files["someone/model"] == allowed(run_folder)


def test_a_push_without_a_hub_or_files_or_token(
    hub: HubStandIn, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match=r"to someone/model failed: the Hub does not accept the token \(401\)"):
        push_to_hub(run_folder, repo_id="someone/model", token="hf_TheWrongToken")
    with pytest.raises(RunError, match="there is no token: give --hub_token"):
        push_to_hub(run_folder, repo_id="someone/model", token=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"empty has no config.json and no diffusion_pytorch_model.safetensors"):
        push_to_hub(tmp_path / "empty", repo_id="someone/model", token=TOKEN)
    with pytest.raises(RunError, match=r"The push to circles-run failed: .*\(401\)"):
        resolve_repo_id(run_folder, None, "hf_TheWrongToken")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
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
    assert check_push(TrainConfig(**given)) == []
    assert check_push(TrainConfig(**given, push_to_hub=True, hub_token=TOKEN, hub_model_id="a/b")) == []
    no_token, bad_name = check_push(TrainConfig(**given, push_to_hub=True, hub_model_id="a b"))
    assert no_token == "--push_to_hub: needs a token: give --hub_token, set HF_TOKEN, or run `hf auth login`"
    assert bad_name.startswith("--hub_model_id=a b: ")


def test_find_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_environment")
    assert find_token(None) == "hf_of_environment"
    assert find_token(TOKEN) == TOKEN
