"""No secret is in anything that a run writes, sends or shows.

A run on a Ray of its own, with checkpoint, validation, trackers and push, in a folder that is its home, its temporary
folder and its working directory at once. While it goes on, the command lines of all processes are read; afterwards
every byte of the folder and of what the Hub's stand-in received. What is searched for is drawn anew for every run.
"""

from __future__ import annotations

import base64
import gzip
import os
import secrets
import shutil
import string
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from hub_stand_in import HubStandIn
from processes import processes_of_session

import raycontrolnet
from raycontrolnet import TrainConfig
from raycontrolnet.launch.preflight import check
from raycontrolnet.storage.run_folder import RunFolder

TIMEOUT_S = 400.0
SAMPLING_INTERVAL_S = 0.25
TOOLS = ("tensorboard", "wandb", *(["comet_ml"] if find_spec("comet_ml") else []))

IN_PYTHON = """
import os, sys
import yaml
from raycontrolnet import TrainConfig, fit

if __name__ == "__main__":
    token = sys.stdin.read()
    fit(TrainConfig(**yaml.safe_load(open("settings.yaml")), hub_token=token))
"""


# The search


def forms(secret: str) -> list[bytes]:
    """`secret` as files may hold it: plain, in 16 bits, in hexadecimal digits, and in base64 wherever it begins."""
    plain = secret.encode()
    in_base64 = []
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + plain)
        whole = encoded[4 if before else 0 : len(encoded) - 4]  # without the digits that neighbours have a part in
        in_base64 += [whole, whole.translate(bytes.maketrans(b"+/", b"-_"))]
    return [plain, secret.encode("utf-16-le"), plain.hex().encode(), *dict.fromkeys(in_base64)]


def unpacked(name: str, content: bytes) -> Iterator[tuple[str, bytes]]:
    """`content`, and what it holds in compressed form."""
    yield name, content
    if content.startswith(b"\x1f\x8b"):
        yield from unpacked(f"{name} (unpacked)", gzip.decompress(content))
    elif content.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(BytesIO(content)) as archive:
            for member in archive.namelist():
                yield from unpacked(f"{name}: {member}", archive.read(member))


def written(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Everything in `folder`: names, contents, where links lead."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        yield name, name.encode()
        if path.is_symlink():
            yield name, str(path.readlink()).encode()
        elif path.is_file():
            yield from unpacked(name, path.read_bytes())


def received(hub: HubStandIn) -> Iterator[tuple[str, bytes]]:
    """Everything that was sent to the stand-in, but for the header that is there to hold the token."""
    for request in hub.requests:
        name = f"{request.method} {request.path.partition('?')[0]}"
        headers = {header: value for header, value in request.headers.items() if header != "authorization"}
        yield name, f"{request.path} {headers}".encode()
        yield from unpacked(name, request.body)
    for repository, files in hub.files.items():
        for path, content in files.items():
            yield from unpacked(f"received {repository}/{path}", content)


def where(secret: str, things: Mapping[str, list[bytes]]) -> list[str]:
    """Names of the things that hold `secret` in some form."""
    looked_for = forms(secret)
    return [name for name, contents in things.items() if any(f in content for content in contents for f in looked_for)]


def collected(*sources: Iterator[tuple[str, bytes]]) -> dict[str, list[bytes]]:
    things: dict[str, list[bytes]] = {}
    for source in sources:
        for name, content in source:
            things.setdefault(name, []).append(content)
    return things


@dataclass
class CommandLines:
    """Inside the `with`, what `ps` shows of all processes of the machine: pid -> its command lines in turn."""

    seen: dict[int, list[str]] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> CommandLines:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLING_INTERVAL_S):
            for process in psutil.process_iter():
                try:
                    line = " ".join(process.cmdline())
                except psutil.Error:
                    continue
                lines = self.seen.setdefault(process.pid, [])
                if lines[-1:] != [line]:
                    lines.append(line)


def test_the_search_finds(tmp_path: Path) -> None:
    secret = token("hf_")
    hidden = {
        "plain.txt": f"a {secret} b".encode(),
        "wide.txt": secret.encode("utf-16"),
        "digits.txt": secret.encode().hex().encode(),
        "packed.gz": gzip.compress(f"x{secret}".encode()),
        **{f"base64-{n}.txt": base64.b64encode(b"x" * n + secret.encode() + b"yyy") for n in range(3)},
        "url-base64.txt": base64.urlsafe_b64encode(b"??>" + secret.encode()),
    }
    for name, content in hidden.items():
        (tmp_path / name).write_bytes(content)
    inner = BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("member", f"{secret}" * 100)
    with zipfile.ZipFile(tmp_path / "outer.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner.zip", inner.getvalue())
    (tmp_path / "folder" / f"name-{secret}").mkdir(parents=True)
    (tmp_path / "link").symlink_to(f"/nowhere/{secret}")
    (tmp_path / "harmless.txt").write_text(f"{secret[:-1]}-{secret[1:]}")
    found = where(secret, collected(written(tmp_path)))
    assert sorted(found) == sorted([
        *(name for name in hidden if name != "packed.gz"), "packed.gz (unpacked)", "outer.zip: inner.zip: member",
        f"folder/name-{secret}", "link",
    ])  # fmt: skip
    with CommandLines() as lines:
        process = subprocess.Popen([sys.executable, "-c", "input()", secret], stdin=subprocess.PIPE)
        time.sleep(1.0)
        process.communicate(b"\n")
    assert [pid for pid, seen in lines.seen.items() if secret in " ".join(seen)] == [process.pid]


def test_what_ray_shows_of_a_run_has_no_token(tiny_settings: dict[str, Any]) -> None:
    """Ray Train keeps `str` of what the workers get, for its dashboard and its exported events."""
    hub_token = token("hf_")
    config = TrainConfig(**tiny_settings, hub_token=hub_token)
    run = check(config, RunFolder(config.output_dir))
    job = run.job(use_gpu=False, threads=1, loader=run.loader)
    assert (run.token, job.token, job.config.hub_token) == (hub_token, hub_token, None)
    for shown in (config, run, job):
        assert "output_dir=" in repr(shown)
        assert hub_token not in repr(shown) + str(shown)


# The run


def token(prefix: str) -> str:
    return prefix + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(34))


@pytest.fixture
def box() -> Iterator[Path]:
    """Make the folder that the run may write to. Its name is short, for Ray makes sockets below it."""
    box = Path(tempfile.mkdtemp(prefix="rcs", dir="/tmp"))
    yield box
    end_processes_of(box)
    shutil.rmtree(box)


def end_processes_of(box: Path) -> None:
    """Kill the processes that a failed test left: their environment names the folder."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") == str(box / "home"):
                process.kill()
        except psutil.Error:
            continue


def environment(box: Path, hub: HubStandIn) -> dict[str, str]:
    """Return the environment of a user who has nothing but what is in `box`."""
    ours = ("HF_", "HUGGING", "RAY_", "WANDB_", "COMET_", "XDG_", "TMPDIR", "PYTEST")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    folders = {"HOME": "home", "TMPDIR": "tmp", "RAY_TMPDIR": "."}
    folders |= {f"XDG_{kind}_HOME": f"xdg-{kind.lower()}" for kind in ("CACHE", "CONFIG", "DATA", "STATE")}
    for folder in folders.values():
        (box / folder).mkdir(exist_ok=True)
    return kept | {name: str(box / folder) for name, folder in folders.items()} | {
        "PYTHONPATH": str(Path(raycontrolnet.__file__).parents[1]),
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1",
        "WANDB_MODE": "offline", "COMET_START_ONLINE": "0",
    }  # fmt: skip


@pytest.mark.parametrize(
    "given",
    ["by flag", *(pytest.param(given, marks=pytest.mark.slow) for given in ("by environment", "in Python"))],
)
def test_no_secret_is_left_anywhere(given: str, box: Path, tiny_settings: dict[str, Any]) -> None:
    hub_token, wandb_key, comet_key = token("hf_"), secrets.token_hex(20), token("")
    canary = f"circle{secrets.token_hex(8)}"
    with HubStandIn(hub_token) as hub, CommandLines() as lines:
        env = environment(box, hub) | {"WANDB_API_KEY": wandb_key, "COMET_API_KEY": comet_key}
        driver = train(given, settings(tiny_settings, canary), hub_token, box, env)
        end_of_run = time.monotonic()
        while left := processes_of_session(driver):
            assert time.monotonic() < end_of_run + 20, left
            time.sleep(0.2)
    assert hub.files["someone/out"].keys() >= {"README.md", "images/pair-00-grid.png"}, (box / "stderr").read_text()

    things = collected(written(box), received(hub))
    assert_searched(things, where(canary, things))
    for secret in (hub_token, wandb_key, comet_key):
        assert where(secret, things) == []

    assert any("RayTrainWorker" in line for seen in lines.seen.values() for line in seen)
    assert given == "in Python" or any(canary in line for line in lines.seen[driver])
    for pid, seen in lines.seen.items():
        # What the user typed is there to see until the program starts again without it, before it starts others.
        shown = [line for line in seen if hub_token in line]
        assert not shown or (given == "by flag" and pid == driver and len(shown) == 1 and shown[0] != seen[-1])
        assert not [line for line in seen if wandb_key in line or comet_key in line]


def settings(tiny_settings: dict[str, Any], canary: str) -> dict[str, Any]:
    """Return the settings of a run on Ray that does everything that leaves the house."""
    return tiny_settings | {
        "output_dir": "out",
        "max_train_steps": 2,
        "num_workers": 1,
        "cache_latents": "on",
        "validation_prompt": [f"red {canary}"],
        "validation_image": [str(Path(tiny_settings["train_data_dir"]) / "conditioning" / "00000.png")],
        "num_validation_images": 1,
        "report_to": "all",
        "push_to_hub": True,
    }


def train(given: str, settings: dict[str, Any], hub_token: str, box: Path, env: dict[str, str]) -> int:
    """Train in a process of its own; returns its pid."""
    import yaml

    if given == "in Python":
        (box / "settings.yaml").write_text(yaml.safe_dump(settings))
        (box / "script.py").write_text(IN_PYTHON)
        command, typed = ["script.py"], hub_token
    else:
        command, typed = ["-m", "raycontrolnet", "train"], ""
        for name, value in settings.items():
            values = value if isinstance(value, list) else [] if value is True else [value]
            command += [f"--{name}", *map(str, values)]
        if given == "by flag":
            command += ["--hub_token", hub_token]
        else:
            env = env | {"HF_TOKEN": hub_token}
    with (box / "stdout").open("wb") as stdout, (box / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=box, env=env, stdin=subprocess.PIPE, stdout=stdout, stderr=stderr,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(typed.encode(), timeout=TIMEOUT_S)
        finally:
            process.kill()
    assert process.returncode == 0, (box / "stderr").read_text()
    return process.pid


def assert_searched(things: Mapping[str, list[bytes]], holding_canary: list[str]) -> None:
    """Check that the search saw something: the prompt is found where it belongs, and Ray's files are there."""
    out = ("config.yaml", "README.md", "run.log", "validation/step-000002/metadata.jsonl", "checkpoint-2/manifest.json")
    assert {f"out/{name}" for name in out} <= set(holding_canary)
    tools = {"tensorboard": "events.out.tfevents", "wandb": ".wandb", "comet_ml": ".zip: messages.json"}
    for tool in TOOLS:
        assert [name for name in holding_canary if name.startswith("out/logs/") and tools[tool] in name], tool
    assert "received someone/out/README.md" in holding_canary
    assert {"stdout", "stderr", "out/checkpoint-2/training_state.pt: training_state/data.pkl"} <= things.keys()
    of_ray = {name: contents for name, contents in things.items() if name.startswith("ray/session_")}
    assert len(of_ray) > 30
    assert any(b"raycontrolnet" in content for contents in of_ray.values() for content in contents)
